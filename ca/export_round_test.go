package ca

import "context"

// Reading begins a reading; release says whether what was read may be released.
func (r *Rounds) Reading(ctx context.Context) (release func() error, err error) {
	at, err := r.reads(ctx)
	return func() error { return r.still(at) }, err
}
