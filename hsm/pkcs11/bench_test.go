package pkcs11_test

import (
	"path/filepath"
	"testing"

	"trivet/hsm"
	"trivet/hsm/hsmtest"
	"trivet/hsm/pkcs11"
)

// BenchmarkSign is the token's own rate, without agent and wire.
func BenchmarkSign(b *testing.B) {
	module, dir := hsmtest.Module(b), b.TempDir()
	b.Setenv("SOFTHSM2_CONF", hsmtest.SoftHSM(b, dir))
	pin := filepath.Join(dir, "pin")
	hsmtest.Write(b, pin, "1234")
	if _, err := pkcs11.Init(pkcs11.InitConfig{Module: module, TokenLabel: "bench", PINFile: pin, SOPINFile: pin}); err != nil {
		b.Fatal(err)
	}
	token, err := pkcs11.Open(pkcs11.Config{Module: module, TokenLabel: "bench", PINFile: pin})
	if err != nil {
		b.Fatal(err)
	}
	defer token.Close()
	k, err := token.Generate(hsmtest.Spec("bench", hsm.PurposeCA))
	if err != nil {
		b.Fatal(err)
	}
	digest := hsmtest.Digests(1)[0]
	b.ResetTimer()
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			if _, err := token.Sign(k.ID, digest); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "signatures/s")
}
