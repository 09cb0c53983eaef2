package pkcs11_test

import (
	"fmt"
	"testing"

	"trivet/hsm"
	"trivet/hsm/hsmtest"
	"trivet/hsm/pkcs11"
)

// BenchmarkSign is the token's own rate, without agent and wire.
func BenchmarkSign(b *testing.B) {
	for _, m := range []*kind{softHSM, nss} {
		b.Run(m.name, func(b *testing.B) {
			cfg, _ := m.fresh(b)
			token := open(b, cfg)
			for _, a := range hsm.Algorithms() {
				spec := hsmtest.Spec("bench", hsm.PurposeCA)
				spec.Algorithm = a
				k, err := token.Generate(spec)
				if err != nil {
					continue // the module cannot make such keys
				}
				b.Run(string(a), func(b *testing.B) {
					digest := hsmtest.DigestsFor(a, 1)[0]
					b.RunParallel(func(p *testing.PB) {
						for p.Next() {
							if _, err := token.Sign(k.ID, digest); err != nil {
								b.Error(err)
								return
							}
						}
					})
					b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "signatures/s")
				})
			}
		})
	}
}

// BenchmarkOpen is what a restart costs.
func BenchmarkOpen(b *testing.B) {
	for _, m := range []*kind{softHSM, nss} {
		b.Run(m.name, func(b *testing.B) {
			cfg, _ := m.fresh(b)
			for b.Loop() {
				token, err := pkcs11.Open(cfg)
				if err != nil {
					b.Fatal(err)
				}
				closed(b, token)
			}
		})
	}
}

// BenchmarkCount is what an agent does once a minute, with a few hundred keys.
func BenchmarkCount(b *testing.B) {
	cfg, _ := softHSM.fresh(b)
	token := open(b, cfg)
	for i := range 300 {
		if _, err := token.Generate(hsmtest.Spec(fmt.Sprintf("k-%d", i), hsm.PurposeOCSP)); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		if err := token.Count(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkInventory is with a few hundred keys.
func BenchmarkInventory(b *testing.B) {
	for _, m := range []*kind{softHSM, nss} {
		b.Run(m.name, func(b *testing.B) {
			cfg, _ := m.fresh(b)
			token := open(b, cfg)
			for i := range 300 {
				if _, err := token.Generate(hsmtest.Spec(fmt.Sprintf("k-%d", i), hsm.PurposeOCSP)); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				if _, err := token.Inventory(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
