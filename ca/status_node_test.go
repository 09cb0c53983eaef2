package ca_test

import (
	"context"
	"net/http"
	"testing"

	"trivet/ca"
	"trivet/ca/catest"
	"trivet/db"
	"trivet/identity"
)

func soon(t testing.TB) context.Context { return catest.Soon(t) }

// established is a node with CAs, on a database of the test's own.
func established(t *testing.T, members ca.MemberChain, net http.RoundTripper) (*catest.Node, *catest.Keys, db.Config) {
	t.Helper()
	cfg := cluster.Need(t).New(t)
	n, keys := catest.Established(t, cfg, catest.Config{Members: members, Transport: net})
	return n, keys, cfg
}

// issue issues a certificate for a new key.
func issue(t testing.TB, n *catest.Node, by identity.Principal, key string) *ca.Issued {
	t.Helper()
	issued, err := n.Engine.Issue(soon(t), ca.Request{Principal: by.String(), IdempotencyKey: key, Profile: "tls-server", CSR: catest.CSR(t, "www.example.org")})
	if err != nil {
		t.Fatal(err)
	}
	return issued
}

func person(role identity.Role, name string) identity.Principal {
	return identity.Principal{Cluster: "test", Role: role, Name: name}
}
