package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
)

// pending is a request for a new key's certificate that has no answer yet. It is written before the request is sent, so that whatever ends this
// process, the next one asks for the same certificate and not for another.
type pending struct {
	IdempotencyKey string       `json:"idempotency_key"`
	Names          []string     `json:"names"`
	Request        issueRequest `json:"request"`
}

// unfinished is where a pending request is kept.
func unfinished(keyOut string) string { return keyOut + ".request" }

// prepare puts the CSR into req and returns the idempotency key: from a file, with a new key that goes to keyOut before anybody certifies it, or as an
// earlier call left them.
func (a *app) prepare(csrFile string, names []string, keyOut string, req *issueRequest, key string) (string, error) {
	if csrFile != "" {
		csr, err := a.readFile(csrFile)
		if err != nil {
			return "", fmt.Errorf("reading the request: %w", err)
		}
		req.CSR = string(csr)
		if key == "" {
			key = newKey()
		}
		return key, nil
	}
	_, err := os.Stat(keyOut)
	if err == nil {
		return a.resume(names, keyOut, req, key)
	}
	if !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("looking for the key: %w", err)
	}
	csr, private, err := newRequest(names)
	if err != nil {
		return "", err
	}
	if key == "" {
		key = newKey()
	}
	req.CSR = string(csr)
	text, err := json.MarshalIndent(pending{IdempotencyKey: key, Names: names, Request: *req}, "", "  ")
	if err != nil {
		return "", err
	}
	// The key last: with it there, the request is.
	if err := writeFile(unfinished(keyOut), append(text, '\n'), 0o600); err != nil {
		return "", err
	}
	if err := writeFile(keyOut, private, 0o600); err != nil {
		return "", err
	}
	a.sayf("wrote the new key %s", keyOut)
	return key, nil
}

// resume goes on with what an earlier call asked for and got no answer to.
func (a *app) resume(names []string, keyOut string, req *issueRequest, key string) (string, error) {
	text, err := os.ReadFile(unfinished(keyOut))
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("%s is there already: name another file, or use its key with --csr", keyOut)
	}
	var p pending
	if err == nil {
		err = json.Unmarshal(text, &p)
	}
	if err != nil {
		return "", fmt.Errorf("reading what was asked for with the key %s: %w", keyOut, err)
	}
	asked := p.Request
	asked.CSR = ""
	if !slices.Equal(p.Names, names) || asked != *req || key != "" && key != p.IdempotencyKey {
		return "", fmt.Errorf("%s is the key of another request that has no answer yet, %s: repeat that one as it was, or name another file", keyOut, unfinished(keyOut))
	}
	*req = p.Request
	a.sayf("going on with the key %s and idempotency key %s: an earlier request for it had no answer", keyOut, p.IdempotencyKey)
	return p.IdempotencyKey, nil
}
