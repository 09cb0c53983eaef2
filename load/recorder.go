package load

import (
	"bytes"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Acknowledged is a certificate that a client was given with status 201.
type Acknowledged struct {
	Request
	ID     string // as the API names it
	Serial string // lower-case hex
	Issuer string // distinguished name, as the certificate has it
	DER    []byte
	// Replayed tells that the API said it had answered this request before.
	Replayed bool
	At       time.Time
}

// Recorder remembers every certificate acknowledged during a load, to be looked for afterwards. The zero value is ready.
// It is safe for concurrent use.
type Recorder struct {
	mu         sync.Mutex // guards all below
	all        []Acknowledged
	byKey      map[string]int // Idempotency-Key or, without one, the name asked for
	bySerial   map[string]int
	duplicates []string
}

// Add records a. The same certificate again for the same request is recorded once.
func (r *Recorder) Add(a Acknowledged) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byKey == nil {
		r.byKey, r.bySerial = map[string]int{}, map[string]int{}
	}
	key, serial := "key "+a.Key, a.Issuer+" / "+a.Serial
	if a.Key == "" {
		key = "name " + a.DNS
	}
	if i, known := r.byKey[key]; known {
		if !bytes.Equal(r.all[i].DER, a.DER) {
			r.duplicates = append(r.duplicates, fmt.Sprintf("%s: certificates %s and %s", key, r.all[i].Serial, a.Serial))
			r.all = append(r.all, a) // it was acknowledged all the same
		}
		return
	}
	if i, known := r.bySerial[serial]; known {
		r.duplicates = append(r.duplicates, fmt.Sprintf("serial %s: for %s and %s", a.Serial, r.all[i].DNS, a.DNS))
	}
	r.byKey[key], r.bySerial[serial] = len(r.all), len(r.all)
	r.all = append(r.all, a)
}

// Len is the number of certificates recorded.
func (r *Recorder) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}

// All returns the certificates recorded so far, in the order of their acknowledgement.
func (r *Recorder) All() []Acknowledged {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.all)
}

// Duplicates describes every violation of "one request, one certificate" and "one serial, once". There should be none.
func (r *Recorder) Duplicates() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.duplicates)
}
