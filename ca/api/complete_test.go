package api_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"trivet/ca"
	"trivet/ca/api"
)

// healing are rounds of which one is under way.
type healing struct{}

func (healing) Complete(_ context.Context, read func() error) error {
	if err := read(); err != nil {
		return err
	}
	return &ca.Error{Name: ca.DatabaseUnavailable, Detail: "recovery round 7 is under way, waiting for ca2: repeat the request", RetryAfter: time.Second}
}

// What promises to be all there is says so only when it is: during a recovery round the answer is 503, and names the cause.
func TestDuringARecoveryRoundNothingIsAnsweredAsIfItWereWhole(t *testing.T) {
	s := newSite(t, func(c *api.Config) { c.Rounds = healing{} })
	spki := strings.Repeat("ab", 32)
	for _, path := range []string{"/v1/certificates", "/v1/certificates?status=valid", "/v1/certificates/0102030405", "/v1/blocked-keys", "/v1/blocked-keys/" + spki} {
		a := s.call(t, s.admin, olga, "GET", path, "")
		if name, _ := a.problem(t); name != ca.DatabaseUnavailable || !strings.Contains(string(a.body), "recovery round 7") {
			t.Errorf("%s: %d %s", path, a.status, a.body)
		}
	}
	for _, path := range []string{"/v1/cas", "/v1/profiles", "/livez"} {
		if a := s.call(t, s.admin, olga, "GET", path, ""); a.status != 200 {
			t.Errorf("%s: %d %s", path, a.status, a.body)
		}
	}
}
