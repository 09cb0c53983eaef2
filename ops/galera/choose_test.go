package galera_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"trivet/ops/galera"
)

const (
	historyA = "11111111-1111-1111-1111-111111111111"
	historyB = "22222222-2222-2222-2222-222222222222"
)

var peers = []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}

// stopped is the inspection of node i (1 to 3), which crashed at seqno in a view of members.
func stopped(i int, history string, seqno int64, members ...string) galera.Inspection {
	name := "db" + string(rune('0'+i))
	in := galera.Inspection{Format: 1, Node: name, Address: peers[i-1], Cluster: "c", Peers: peers, Data: "/d/" + name, At: time.Unix(1000, 0),
		State: &galera.State{UUID: history, Seqno: -1}, Position: &galera.Position{UUID: history, Seqno: seqno}}
	if len(members) > 0 {
		in.View = &galera.View{Self: name, ID: strings.Join(members, "+"), Members: members}
	}
	return in
}

func TestChoice(t *testing.T) {
	all := []string{"db1", "db2", "db3"}
	lost := func(i int) galera.Inspection {
		in := stopped(i, historyA, 0)
		in.State, in.Position, in.Problem = nil, nil, "it has no data"
		return in
	}
	with := func(in galera.Inspection, change func(*galera.Inspection)) galera.Inspection { change(&in); return in }
	for _, c := range []struct {
		name    string
		in      []galera.Inspection
		accept  galera.Accept
		want    string   // node to bootstrap; "" refused
		says    []string // in the refusal or the reasons
		history bool     // a new one
		full    []string // nodes that fetch everything
	}{
		{name: "the highest of all", in: []galera.Inspection{stopped(1, historyA, 5, all...), stopped(2, historyA, 9, all...), stopped(3, historyA, 7, all...)}, want: "db2", says: []string{"highest of all nodes, at 9"}},
		{name: "a tie is no trouble", in: []galera.Inspection{stopped(1, historyA, 9), stopped(2, historyA, 9), stopped(3, historyA, 9)}, want: "db1"},
		{name: "nothing inspected", says: []string{"pkictl galera inspect"}},
		{name: "one host not asked", in: []galera.Inspection{stopped(1, historyA, 5, all...), stopped(2, historyA, 9, all...)},
			says: []string{"10.0.0.3: nobody has inspected it", "--without 10.0.0.3 --i-accept-loss"}},
		{name: "one host not asked, by the operator's word", in: []galera.Inspection{stopped(1, historyA, 5, all...), stopped(2, historyA, 9, all...)},
			accept: galera.Accept{Without: []string{"10.0.0.3"}, Loss: true}, want: "db2", history: true, full: []string{"db1", "10.0.0.3"}},
		{name: "a disk is lost that was in the last view", in: []galera.Inspection{stopped(1, historyA, 5, all...), lost(2), stopped(3, historyA, 9, all...)},
			says: []string{"db2: its position is unknown", "it has no data", "--without db2 --i-accept-loss"}},
		{name: "that disk given up", in: []galera.Inspection{stopped(1, historyA, 5, all...), lost(2), stopped(3, historyA, 9, all...)},
			accept: galera.Accept{Without: []string{"db2"}, Loss: true}, want: "db3", history: true, full: []string{"db1", "db2"}},
		{name: "given up without saying what that costs", in: []galera.Inspection{stopped(1, historyA, 5, all...), lost(2), stopped(3, historyA, 9, all...)},
			accept: galera.Accept{Without: []string{"db2"}}, says: []string{"add --i-accept-loss"}},
		{name: "loss accepted, of nobody", in: []galera.Inspection{stopped(1, historyA, 5), stopped(2, historyA, 5), stopped(3, historyA, 5)},
			accept: galera.Accept{Loss: true}, says: []string{"--without NODE"}},
		{name: "no such node to do without", in: []galera.Inspection{stopped(1, historyA, 5)}, accept: galera.Accept{Without: []string{"db9"}, Loss: true}, says: []string{"db9", "db1, 10.0.0.2, 10.0.0.3"}},
		{name: "a disk is lost of a node that had left before", in: []galera.Inspection{stopped(1, historyA, 5, "db1", "db2"), stopped(2, historyA, 9, "db1", "db2"), lost(3)},
			want: "db2", says: []string{"db3 cannot have held more", "nobody but db1 and db2"}, full: []string{"db3"}},
		{name: "the same, but an older view names it", in: []galera.Inspection{stopped(1, historyA, 5, all...), stopped(2, historyA, 9, "db1", "db2"), lost(3)}, says: []string{"--without db3"}},
		{name: "the last one to stop knows all", in: []galera.Inspection{lost(1), with(stopped(2, historyA, 9), func(in *galera.Inspection) {
			in.State.SafeToBootstrap, in.State.Seqno = true, 9
		}), stopped(3, historyA, 7)}, want: "db2", says: []string{"was the last to stop"}, full: []string{"db1"}},
		{name: "safe, but another stands higher", in: []galera.Inspection{lost(1), with(stopped(2, historyA, 9), func(in *galera.Inspection) {
			in.State.SafeToBootstrap, in.State.Seqno = true, 9
		}), stopped(3, historyA, 11)}, says: []string{"--without db1"}},
		{name: "left in good order, nobody last", in: []galera.Inspection{stopped(1, historyA, 9), stopped(2, historyA, 9), lost(3)}, says: []string{"--without db3"}},
		{name: "two histories", in: []galera.Inspection{stopped(1, historyA, 5), stopped(2, historyB, 9), stopped(3, historyA, 7)},
			says: []string{historyA, historyB, "--without db1 --without db3 --i-accept-loss", "--without db2 --i-accept-loss"}},
		{name: "two histories, one given up", in: []galera.Inspection{stopped(1, historyA, 5), stopped(2, historyB, 9), stopped(3, historyA, 7)},
			accept: galera.Accept{Without: []string{"db2"}, Loss: true}, want: "db3", history: true, full: []string{"db1", "db2"}},
		{name: "given up for nothing", in: []galera.Inspection{stopped(1, historyA, 5), stopped(2, historyA, 9), stopped(3, historyA, 7)},
			accept: galera.Accept{Without: []string{"db1"}, Loss: true}, want: "db2", full: []string{"db1"}},
		{name: "the highest given up although it is known", in: []galera.Inspection{stopped(1, historyA, 5), stopped(2, historyA, 9), stopped(3, historyA, 7)},
			accept: galera.Accept{Without: []string{"db2"}, Loss: true}, want: "db3", history: true, full: []string{"db1", "db2"}},
		{name: "a node runs, without majority", in: []galera.Inspection{stopped(1, historyA, 5, all...), with(stopped(2, historyA, 9), func(in *galera.Inspection) { in.Running, in.Position = true, nil }), stopped(3, historyA, 7, all...)},
			says: []string{"db2: a mariadbd is running", "stop it"}},
		{name: "a node runs, and giving it up does not help", in: []galera.Inspection{stopped(1, historyA, 5), with(stopped(2, historyA, 9), func(in *galera.Inspection) { in.Running, in.Position = true, nil }), stopped(3, historyA, 7)},
			accept: galera.Accept{Without: []string{"db2"}, Loss: true}, says: []string{"db2: a mariadbd is running"}},
		{name: "the cluster lives", in: []galera.Inspection{stopped(1, historyA, 5), with(stopped(2, historyA, 9), func(in *galera.Inspection) { in.Running, in.Primary, in.Position = true, true, nil }), stopped(3, historyA, 7)},
			says: []string{"the cluster lives"}},
		{name: "everything at once", in: []galera.Inspection{lost(1), stopped(2, historyA, 9, all...)}, says: []string{"db1: ", "10.0.0.3: ", "--without db1 --i-accept-loss", "--without 10.0.0.3 --i-accept-loss"}},
		{name: "nobody has a position", in: []galera.Inspection{lost(1), lost(2), lost(3)}, accept: galera.Accept{Without: []string{"db1", "db2", "db3"}, Loss: true}, says: []string{"backup"}},
		{name: "another cluster's node", in: []galera.Inspection{stopped(1, historyA, 5), with(stopped(2, historyA, 9), func(in *galera.Inspection) { in.Cluster = "other" })}, says: []string{`"other"`}},
		{name: "one node twice", in: []galera.Inspection{stopped(1, historyA, 5), stopped(1, historyA, 6)}, says: []string{"two inspections are of 10.0.0.1"}},
		{name: "an inspection of another version", in: []galera.Inspection{with(stopped(1, historyA, 5), func(in *galera.Inspection) { in.Format = 2 })}, says: []string{"format 2"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := galera.Choose(c.in, c.accept)
			var refusal *galera.Refusal
			text := strings.Join(p.Reasons, "\n")
			if err != nil {
				text = err.Error()
			}
			if p.Bootstrap != c.want || errors.As(err, &refusal) != (c.want == "") {
				t.Fatalf("chose %q, %v; want %q", p.Bootstrap, err, c.want)
			}
			for _, s := range c.says {
				if !strings.Contains(text, s) {
					t.Errorf("does not say %q:\n%s", s, text)
				}
			}
			if err != nil {
				return
			}
			var full []string
			for _, j := range p.Join {
				if j.Transfer == "full" {
					full = append(full, j.Node)
				}
			}
			if p.NewHistory != c.history || !slices.Equal(full, c.full) || len(p.Join) != 2 {
				t.Errorf("new history %t, full transfers to %v: %+v", p.NewHistory, full, p)
			}
		})
	}
}

func TestReunionNeedsOneViewOfAll(t *testing.T) {
	all := []string{"db1", "db2", "db3"}
	for _, c := range []struct {
		in   []galera.Inspection
		want bool
	}{
		{[]galera.Inspection{stopped(1, historyA, 5, all...), stopped(2, historyA, 9, all...), stopped(3, historyA, 7, all...)}, true},
		{[]galera.Inspection{stopped(1, historyA, 5, all...), stopped(2, historyA, 9, all...), stopped(3, historyA, 7)}, false},
		{[]galera.Inspection{stopped(1, historyA, 5, all...), stopped(2, historyA, 9, "db2", "db3"), stopped(3, historyA, 9, "db2", "db3")}, false},
	} {
		if p, err := galera.Choose(c.in, galera.Accept{}); err != nil || p.Reunion != c.want {
			t.Errorf("%+v, %v; want %t", p, err, c.want)
		}
	}
}
