package main

import (
	"context"

	"trivet/ca"
	"trivet/hsmsync"
)

// keys gives the engine the HSM groups' keys. It is here, since package ca knows no HSM.
type keys struct{ groups *hsmsync.Groups }

// Key returns a live key of the group that its name says.
func (k keys) Key(ctx context.Context, name ca.KeyName) (ca.Signer, error) {
	key, err := k.groups.Key(ctx, name.Group, name.ID)
	if err != nil {
		return nil, err
	}
	return key, nil
}
