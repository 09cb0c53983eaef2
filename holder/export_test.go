package holder

// ParseBatch reads a batch as it comes from the network.
var ParseBatch = parseBatch
