package hsmtest

import (
	"context"

	"trivet/hsm"
	"trivet/hsm/agent"
)

// Direct calls a token in this process. Digests of a batch are signed one after the other.
func Direct(t agent.Token) Token { return direct{t} }

type direct struct{ t agent.Token }

func (d direct) Health(context.Context) (hsm.Info, error) {
	i := d.t.Info()
	e, err := d.t.Epoch()
	i.Site, i.Epoch = e.Site, e.Epoch
	return i, err
}
func (d direct) Inventory(context.Context) ([]hsm.KeyRecord, error) { return d.t.Inventory() }
func (d direct) Sign(_ context.Context, r hsm.SignRequest) ([][]byte, error) {
	if len(r.Digests) < 1 || len(r.Digests) > hsm.MaxBatch {
		return nil, hsm.Errorf(hsm.ClassRequest, "sign", "%d digests", len(r.Digests))
	}
	sigs := make([][]byte, len(r.Digests))
	for i := range r.Digests {
		var err error
		if sigs[i], err = d.t.Sign(r.Key, r.Digests[i]); err != nil {
			return nil, err
		}
	}
	return sigs, nil
}
func (d direct) Generate(_ context.Context, s hsm.KeySpec) (hsm.KeyRecord, error) {
	return d.t.Generate(s)
}
func (d direct) Export(_ context.Context, id hsm.KeyID, kek string) (hsm.Blob, error) {
	return d.t.Export(id, kek)
}
func (d direct) Import(_ context.Context, b hsm.Blob) (hsm.KeyRecord, error) { return d.t.Import(b) }
func (d direct) Adopt(_ context.Context, r hsm.AdoptRequest) (hsm.KeyRecord, error) {
	return d.t.Adopt(r.Spec, r.SPKI, r.Sealed)
}
func (d direct) Destroy(_ context.Context, r hsm.DestroyRequest) error {
	return d.t.Destroy(r.Key, r.SPKI)
}
func (d direct) TransportKey(context.Context) ([]byte, error)        { return d.t.TransportKey() }
func (d direct) GenerateDomain(_ context.Context, kek string) error  { return d.t.GenerateDomain(kek) }
func (d direct) Rotate(_ context.Context, kek string) error          { return d.t.Rotate(kek) }
func (d direct) DropDomain(_ context.Context, kek string) error      { return d.t.DropDomain(kek) }
func (d direct) SetEpoch(_ context.Context, r hsm.EpochRecord) error { return d.t.SetEpoch(r) }
func (d direct) ImportDomain(_ context.Context, kek string, w []byte) error {
	return d.t.ImportDomain(kek, w)
}
func (d direct) ExportDomain(_ context.Context, r hsm.DomainRequest) ([]byte, string, error) {
	return d.t.ExportDomain(r.KEK, r.Recipient)
}
