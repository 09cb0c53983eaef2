package holder_test

import (
	"encoding/hex"
	"encoding/json"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"trivet/holder"
	"trivet/journal"
)

// BenchmarkBatch is all that both journals do for a batch of 16 certificates: intents, digests and done records fsynced in the CA node's own, and the latter
// once more in its second holder's. cpu-ns/op is the processor time of a batch; ns/op says how long the disk takes.
func BenchmarkBatch(b *testing.B) {
	const size = 16
	own, err := journal.Open(journal.Config{Dir: filepath.Join(b.TempDir(), "own"), Node: "ca1", Log: quiet})
	if err != nil {
		b.Fatal(err)
	}
	defer own.Close()
	h := open(b, filepath.Join(b.TempDir(), "held"), &rounds{})
	defer h.Close()
	write := func(payload func(i int) any) (records []journal.Record) {
		for i := range size {
			r, err := journal.New(payload(i))
			if err != nil {
				b.Fatal(err)
			}
			records = append(records, r)
		}
		if err := own.Append(records...); err != nil {
			b.Fatal(err)
		}
		return records
	}
	n := uint64(0)
	var chain []byte
	hash, tbs, der := make([]byte, 32), make([]byte, 520), make([]byte, 620)
	serial := hex.EncodeToString(hash[:20])
	before := processor(b)
	for b.Loop() {
		now := time.Now()
		intent := journal.Intent{Issuer: "demo-g1", Serial: serial, Req: hash, Body: hash, TBS: tbs, Requester: "trivet://demo/requester/bench", Profile: "tls-server",
			ProfileVersion: 1, ProfileHash: hash, SiteEpoch: 1, Node: "ca1", MAC: hash, MACKey: hash[:8], Created: now}
		write(func(int) any { return intent })
		write(func(int) any { return journal.Sign{Issuer: "demo-g1", Serial: serial, Digest: hash} })
		intent.TBS = nil
		batch := holder.Batch{Incarnation: incarnation, From: n + 1, After: chain}
		for _, r := range write(func(int) any {
			n++
			return journal.Done{Issuer: "demo-g1", Serial: serial, Ver: 1, DER: der, Lane: "ca1/" + incarnation + "/0", Seq: n, Kind: journal.DoneCert, N: n, Created: now, Intent: &intent}
		}) {
			batch.Records = append(batch.Records, r.Payload)
			chain = holder.Chain(chain, r.Payload)
		}
		body, err := json.Marshal(batch)
		if err != nil {
			b.Fatal(err)
		}
		var arrived holder.Batch
		if err := json.Unmarshal(body, &arrived); err != nil {
			b.Fatal(err)
		}
		if tip, err := h.Put("ca1", arrived); err != nil || tip.N != n {
			b.Fatal(tip, err)
		}
	}
	b.ReportMetric(float64(processor(b)-before)/float64(b.N), "cpu-ns/op")
}

// processor is the time that this process has had of the processors.
func processor(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
