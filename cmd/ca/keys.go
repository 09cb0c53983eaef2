package main

import (
	"context"

	"trivet/ca"
	"trivet/hsmsync"
)

// keys gives the engine the group's keys. It is here, since package ca knows no HSM.
type keys struct{ group *hsmsync.Group }

// Key returns a live key of the group.
func (k keys) Key(ctx context.Context, id string) (ca.Signer, error) {
	key, err := k.group.Key(ctx, id)
	if err != nil {
		return nil, err
	}
	return key, nil
}
