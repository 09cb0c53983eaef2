package holder

import "time"

// SetNow has a holder take another clock.
func (c *Config) SetNow(now func() time.Time) { c.now = now }

// ParseBatch reads a batch as it comes from the network.
var ParseBatch = parseBatch
