package identity

import (
	"crypto/sha256"
	"crypto/x509"
	"sync"
	"time"
)

const (
	conveyedFor = time.Minute // how long a verification is relied on; a withdrawn trust is felt at once, since a reload begins anew
	conveyedMax = 4096        // certificates remembered
)

// conveyed remembers client certificates that have verified under one trust. It is safe for concurrent use.
type conveyed struct {
	mu    sync.Mutex
	known map[[32]byte]verified // by digest of the certificate
}

type verified struct {
	who Principal
	at  time.Time
}

func (c *conveyed) get(leaf *x509.Certificate, at time.Time) (Principal, bool) {
	if at.Before(leaf.NotBefore) || at.After(leaf.NotAfter) {
		return Principal{}, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	v, ok := c.known[sha256.Sum256(leaf.Raw)]
	if age := at.Sub(v.at); !ok || age < 0 || age > conveyedFor {
		return Principal{}, false
	}
	return v.who, true
}

func (c *conveyed) put(leaf *x509.Certificate, at time.Time, who Principal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil || len(c.known) >= conveyedMax {
		c.known = make(map[[32]byte]verified)
	}
	c.known[sha256.Sum256(leaf.Raw)] = verified{who, at}
}
