package lb

import (
	"sync"
	"time"
)

// budget bounds what is sent twice merely because a node is slow, so that slowness everywhere does not double the load that causes it.
type budget struct {
	mu     sync.Mutex
	tokens float64
	at     time.Time
}

const (
	budgetPerRequest = 0.2
	budgetPerSecond  = 10
	budgetMax        = 100
)

func (b *budget) refill(now time.Time) {
	if !b.at.IsZero() {
		b.tokens = min(budgetMax, b.tokens+budgetPerSecond*now.Sub(b.at).Seconds())
	} else {
		b.tokens = budgetPerSecond
	}
	b.at = now
}

// earn is called for every request.
func (b *budget) earn(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refill(now)
	b.tokens = min(budgetMax, b.tokens+budgetPerRequest)
}

// spend tells whether one more hedge is allowed.
func (b *budget) spend(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refill(now)
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}
