package ocsp

import (
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// LeaseDuration is L of the revocation barrier: how long after the moment before a causal database read a node may
// answer good without another. Whoever acknowledges a revocation without hearing from this node waits L plus a margin.
const LeaseDuration = 5 * time.Second

// BootTime reads CLOCK_BOOTTIME: time since boot, suspend included. Go's own monotonic clock stops in suspend, which
// would let a node that slept answer good under a lease that ended long ago.
func BootTime() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0, fmt.Errorf("reading CLOCK_BOOTTIME: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}

// lease is the right to answer good, until a moment of the node's own CLOCK_BOOTTIME. The zero value is no right.
type lease struct {
	clock func() (time.Duration, error)
	until atomic.Int64 // nanoseconds since boot; 0 is none
}

// extend grants the right until asked + L, where asked was read before the question went out: a revocation
// acknowledged after that moment knows that this node's right ends at most L later.
func (l *lease) extend(asked time.Duration) {
	until := int64(asked + LeaseDuration)
	for {
		old := l.until.Load()
		if old >= until || l.until.CompareAndSwap(old, until) {
			return
		}
	}
}

// end withdraws the right at once.
func (l *lease) end() { l.until.Store(0) }

// remaining reads the clock, now, and returns what is left; zero or less is no right. A clock that cannot be read
// is no right either.
func (l *lease) remaining() time.Duration {
	until := l.until.Load()
	if until == 0 {
		return 0
	}
	now, err := l.clock()
	if err != nil {
		return 0
	}
	return time.Duration(until) - now
}

// valid says whether good may be answered at this very moment. It is asked after the whole request was read and is
// never remembered.
func (l *lease) valid() bool { return l.remaining() > 0 }
