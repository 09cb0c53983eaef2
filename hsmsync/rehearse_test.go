package hsmsync_test

import (
	"strings"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
)

func TestADryRunTellsTheStepsAndChangesNothing(t *testing.T) {
	for name, test := range map[string]struct {
		act  func(*desk) func(*hsmsync.Coordinator) error
		want []string // in this order, each within a step
	}{
		"create": {func(d *desk) func(*hsmsync.Coordinator) error {
			return func(c *hsmsync.Coordinator) error {
				_, err := c.CreateKey(d.t.Context(), hsm.KeySpec{Label: "new", Purpose: hsm.PurposeCA, Algorithm: hsm.P384})
				return err
			}
		}, []string{"enter pending", "a: generate ca:new (P-384)", "import", "enter live"}},
		"enroll": {func(d *desk) func(*hsmsync.Coordinator) error {
			r := d.newcomer("d")
			return func(c *hsmsync.Coordinator) error { return c.Enroll(d.t.Context(), r) }
		}, []string{"enter member d", "d: import-domain", "d: set-epoch 1 (here)", "d: import 12 keys", "d: prove 12 keys", "enter active d"}},
		"replace": {func(d *desk) func(*hsmsync.Coordinator) error {
			r := d.newcomer("b")
			return func(c *hsmsync.Coordinator) error { return c.Replace(d.t.Context(), r) }
		}, []string{"enter remove b", "enter member b", "b: import 12 keys", "enter active b"}},
		"rotate": {func(d *desk) func(*hsmsync.Coordinator) error {
			return func(c *hsmsync.Coordinator) error { return c.RotateDomain(d.t.Context()) }
		}, []string{"enter domain", "a: generate-domain", "import-domain", "enter rotated", "rotate", "drop-domain"}},
		"drain": {func(d *desk) func(*hsmsync.Coordinator) error {
			return func(c *hsmsync.Coordinator) error { return c.Drain(d.t.Context(), "b", "") }
		}, []string{"enter drain b"}},
		"promote": {func(d *desk) func(*hsmsync.Coordinator) error {
			good(d.t, d.c.Standby(d.t.Context(), "b", ""))
			return func(c *hsmsync.Coordinator) error { return c.Promote(d.t.Context(), "b", "") }
		}, []string{"b: prove 12 keys", "enter active b"}},
	} {
		t.Run(name, func(t *testing.T) {
			atDesk(t, func(t *testing.T, d *desk) {
				d.must(labels(12)...)
				good(t, d.c.SetEpoch(t.Context(), hsm.EpochRecord{Site: "here", Epoch: 1}))
				act := test.act(d)
				before, kek := len(d.chain.events()), d.at["a"].kek
				counts := func() (n int) {
					for _, m := range d.at {
						for _, op := range []string{"generate", "import", "destroy", "domain", "import-domain", "rotate", "drop", "epoch"} {
							n += m.count(op)
						}
					}
					return n
				}
				calls := counts()
				plan, err := d.c.DryRun(t.Context(), act)
				good(t, err)
				var text []string
				for _, s := range plan.Steps {
					text = append(text, s.String())
				}
				all := strings.Join(text, "\n")
				for rest := all; len(test.want) > 0; test.want = test.want[1:] {
					i := strings.Index(rest, test.want[0])
					if i < 0 {
						t.Fatalf("the plan does not say %q at its place:\n%s", test.want[0], all)
					}
					rest = rest[i+len(test.want[0]):]
				}
				if len(d.chain.events()) != before || d.at["a"].kek != kek || counts() != calls {
					t.Error("something was changed")
				}
				good(t, act(d.c)) // and it can be done
			})
		})
	}
}

func TestADryRunIsRefusedWhereTheActIs(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.must("x")
		good(t, d.c.Remove(t.Context(), "c", ""))
		_, err := d.c.DryRun(t.Context(), func(c *hsmsync.Coordinator) error { return c.Remove(t.Context(), "b", "") })
		failed(t, err, "2 copies")
		r := d.newcomer("d")
		r.Grant = nil
		plan, err := d.c.DryRun(t.Context(), func(c *hsmsync.Coordinator) error { return c.Enroll(t.Context(), r) })
		good(t, err)
		if got := plan.Steps[0].String(); got != "approve hsm-enroll of ca/d, transport "+sum(d.at["d"].transport) {
			t.Errorf("the first step is %q", got)
		}
		r.Grant = d.grant(d.c.EnrollAct("e", sum(d.at["d"].transport)), time.Hour)
		_, err = d.c.DryRun(t.Context(), func(c *hsmsync.Coordinator) error { return c.Enroll(t.Context(), r) })
		failed(t, err, "what was approved is")
	})
}
