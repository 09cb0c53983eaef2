package hsmsync

import (
	"context"
	"encoding/json"
	"errors"
	"time"
)

// lease says who reconciles a group: the newest entry of the log "{group}/lease", until the time it says. An entry is
// written when it changes hands and a few times an hour.
type lease struct {
	c   *Coordinator
	log string
	ttl time.Duration

	next  uint64    // position after the newest entry known
	until time.Time // of our own lease
}

const eventLease = "lease" // leaseEntry; the subject is the holder

type leaseEntry struct {
	Until time.Time `json:"until"`
}

// newester is a Chain that can tell the newest entry without the others, as Record can.
type newester interface {
	Newest(ctx context.Context, group string) ([]Entry, error)
}

func newLease(c *Coordinator, interval time.Duration) *lease {
	return &lease{c: c, log: c.cfg.Group + "/lease", ttl: 20 * interval, next: 1}
}

func (l *lease) holder() string {
	p := l.c.cfg.Identity.Principal()
	name := string(p.Role) + "/" + p.Name
	return name[:min(len(name), 64)]
}

// hold tells whether this process holds the lease, taking or renewing it where it may.
func (l *lease) hold(ctx context.Context) (bool, error) {
	now := l.c.cfg.Now()
	if now.Before(l.until.Add(-l.ttl / 4)) {
		return true, nil
	}
	newest, err := l.newest(ctx)
	if err != nil {
		return false, err
	}
	if newest.N > 0 {
		l.next = newest.N + 1
		var held leaseEntry
		_ = json.Unmarshal(newest.Payload, &held) // one that cannot be read has run out
		if newest.Subject != l.holder() && now.Before(held.Until) {
			l.until = time.Time{}
			return false, nil
		}
	}
	return l.write(ctx, now.Add(l.ttl))
}

func (l *lease) newest(ctx context.Context) (Entry, error) {
	var all []Entry
	var err error
	if n, ok := l.c.cfg.Chain.(newester); ok {
		all, err = n.Newest(ctx, l.log)
	} else {
		all, err = l.c.cfg.Chain.Log(ctx, l.log, max(1, l.next-1))
	}
	if err != nil || len(all) == 0 {
		return Entry{}, err
	}
	return all[len(all)-1], nil
}

func (l *lease) write(ctx context.Context, until time.Time) (bool, error) {
	payload, err := json.Marshal(leaseEntry{until.UTC()})
	if err != nil {
		return false, err
	}
	err = l.c.cfg.Chain.Append(ctx, l.log, Entry{
		N: l.next, Event: eventLease, Subject: l.holder(), Payload: payload, Actor: l.c.actor, Created: l.c.cfg.Now().UTC().Truncate(time.Microsecond),
	})
	switch {
	case errors.Is(err, ErrTaken):
		return false, nil // somebody else's, or so we shall read
	case err != nil:
		return false, err
	}
	l.next++
	l.until = until
	return true, nil
}

// release lets somebody else have it at once.
func (l *lease) release(ctx context.Context) {
	if !l.c.cfg.Now().Before(l.until) {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveUpTimeout)
	defer cancel()
	if _, err := l.write(ctx, l.c.cfg.Now()); err != nil {
		l.c.log.Info("the lease was not given back; it runs out", "until", l.until, "error", err)
	}
}
