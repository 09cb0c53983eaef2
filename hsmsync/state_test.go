package hsmsync_test

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
)

func TestFold(t *testing.T) {
	id := hsm.NewKeyID()
	payload, err := json.Marshal(hsm.KeyRecord{KeySpec: hsm.KeySpec{ID: id, Label: "x"}})
	good(t, err)
	for log, want := range map[string]string{
		"":                                       "",
		"pending":                                "pending",
		"pending live":                           "live",
		"pending abandoned":                      "abandoned",
		"pending abandoned live":                 "abandoned",
		"pending live abandoned":                 "abandoned",
		"pending abandoned pending":              "abandoned",
		"pending live retired":                   "retired",
		"pending abandoned retired":              "abandoned",
		"pending abandoned destroyed":            "destroyed",
		"pending abandoned destroyed live":       "destroyed",
		"pending live retired destroyed":         "destroyed",
		"pending live destroyed retired":         "destroyed",
		"pending live destroyed destroyed":       "destroyed",
		"pending live quarantined-by-a-newer":    "quarantined-by-a-newer",
		"note pending note live":                 "live",
		"live":                                   "error",
		"pending pending":                        "error",
		"pending live live":                      "error",
		"pending live retired live":              "error",
		"hole pending":                           "error",
		"pending misnamed":                       "error",
		"domain pending live":                    "live",
		"domain-without-payload pending live":    "error",
		"domain domain":                          "error", // the same name again
		"member active member":                   "error",
		"active":                                 "error",
		"member remove active":                   "error",
		"member remove member active":            "",
		"rotated":                                "error",
		"pending live deleted":                   "live",
		"pending live retired deleted abandoned": "error",
	} {
		var entries []hsmsync.Entry
		n := uint64(0)
		for _, event := range strings.Fields(log) {
			n++
			e := hsmsync.Entry{N: n, Event: event, Subject: string(id), Payload: payload}
			switch event {
			case "hole":
				continue
			case "misnamed":
				e.Event, e.Subject = "live", "other"
			case "note":
				e.Subject = "something else"
			case "domain-without-payload":
				e.Event, e.Payload = "domain", nil
			}
			entries = append(entries, e)
		}
		s, err := hsmsync.Fold(entries)
		got := ""
		switch {
		case err != nil:
			got = "error"
		case len(s.Keys()) > 0:
			got = string(s.Keys()[0].State)
		}
		if got != want {
			t.Errorf("log %q is %q, want %q (%v)", log, got, want, err)
		}
	}
}

// story applies entries "event subject" and returns the state.
func story(t *testing.T, lines ...string) *hsmsync.State {
	t.Helper()
	s := hsmsync.NewState()
	tell(t, s, lines...)
	return s
}

func tell(t *testing.T, s *hsmsync.State, lines ...string) {
	t.Helper()
	for _, line := range lines {
		event, rest, _ := strings.Cut(line, " ")
		subject, payload, _ := strings.Cut(rest, " ")
		if payload == "" {
			payload = "{}"
		}
		good(t, s.Apply(hsmsync.Entry{N: s.Next, Event: event, Subject: subject, Payload: []byte(payload), Created: time.Unix(int64(s.Next), 0)}))
	}
}

func TestAStateTellsMembersAndDomains(t *testing.T) {
	s := story(t, `member a {"token_serial":"1"}`, "active a", `member b {"standby":true}`, "standby b", "drain b", `domain k1 {"origin":"a"}`)
	if m, ok := s.Member("b"); !ok || m.State != hsmsync.MemberDrained || !m.Standby {
		t.Errorf("%+v: a drained standby member is to be one again", m)
	}
	tell(t, s, "active b", "drain b")
	if m, _ := s.Member("b"); m.Standby || m.N != 8 || m.Joined != 3 {
		t.Errorf("%+v", m)
	}
	tell(t, s, "recover a", `domain k2 {"origin":"b"}`)
	if m, _ := s.Member("a"); m.Recovered != 9 || m.State != hsmsync.MemberActive {
		t.Errorf("%+v", m)
	}
	if s.Domain.Name != "k1" || s.Rotate.Name != "k2" || s.Rotate.Origin != "b" || len(s.Former) != 0 {
		t.Errorf("%+v %+v %+v", s.Domain, s.Rotate, s.Former)
	}
	tell(t, s, "rotated k2")
	if s.Domain.Name != "k2" || s.Rotate.Name != "" || len(s.Former) != 1 || s.Former[0].Name != "k1" {
		t.Errorf("%+v %+v %+v", s.Domain, s.Rotate, s.Former)
	}
	tell(t, s, "remove a")
	if _, ok := s.Member("a"); ok || len(s.Members()) != 1 {
		t.Errorf("%+v", s.Members())
	}
	tell(t, s, `member a {"token_serial":"2"}`)
	if m, _ := s.Member("a"); m.TokenSerial != "2" || m.State != hsmsync.MemberJoining {
		t.Errorf("%+v", m)
	}
}

func TestADestroyedKeyKeepsItsNewestApproval(t *testing.T) {
	id := string(hsm.NewKeyID())
	s := story(t, `pending `+id+` {"id":"`+id+`"}`, `live `+id+` {"id":"`+id+`"}`, `retired `+id, `destroyed `+id+` {"by":["one"]}`, `destroyed `+id+` {"by":["two"]}`)
	k, _ := s.Key(hsm.KeyID(id))
	if k.State != hsmsync.StateDestroyed || k.N != 4 || !reflect.DeepEqual(k.Note.By, []string{"two"}) {
		t.Errorf("%+v", k)
	}
}

func TestACloneOfAStateIsItsOwn(t *testing.T) {
	id := string(hsm.NewKeyID())
	s := story(t, `member a {}`, `domain k1 {"origin":"a"}`, `pending `+id+` {"id":"`+id+`"}`)
	c := s.Clone()
	if !reflect.DeepEqual(s, c) {
		t.Fatalf("%+v is not %+v", c, s)
	}
	other := string(hsm.NewKeyID())
	tell(t, c, "active a", `live `+id+` {"id":"`+id+`"}`, `domain k2 {"origin":"a"}`, "rotated k2", `pending `+other+` {"id":"`+other+`"}`)
	if m, _ := s.Member("a"); m.State != hsmsync.MemberJoining || len(s.In(hsmsync.StatePending)) != 1 || len(s.Keys()) != 1 || s.Domain.Name != "k1" || s.Next != 4 {
		t.Errorf("the original changed: %+v", s)
	}
}

func TestAPolicyThatCannotBeKeptIsRefused(t *testing.T) {
	fine := hsmsync.NewState().Policy
	for want, spoil := range map[string]func(*hsmsync.Policy){
		"driver":          func(p *hsmsync.Policy) { p.Driver = "magic" },
		"creation":        func(p *hsmsync.Policy) { p.Creation = "" },
		"prefer":          func(p *hsmsync.Policy) { p.Prefer = "best" },
		"min_copies":      func(p *hsmsync.Policy) { p.MinCopies = 1 },
		"master":          func(p *hsmsync.Policy) { p.Creation = hsmsync.CreationMaster },
		"non_extractable": func(p *hsmsync.Policy) { p.NonExtractable = true },
		"sites":           func(p *hsmsync.Policy) { p.Prefer = hsmsync.PreferPriority },
		"destroy_after":   func(p *hsmsync.Policy) { p.DestroyAfter = -1 },
	} {
		p := fine
		spoil(&p)
		failed(t, p.Check(), want)
	}
	good(t, fine.Check())
}
