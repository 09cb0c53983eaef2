package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsmsync"
)

func (a *app) hsmCommand() *cobra.Command {
	c := group("hsm", "HSM groups: members, their state, enrolment, backup",
		`HSM groups: several HSMs with the same keys, used as one. Members come and go while signing goes on; every copy of every key has to be proved by
a signature before it is used; what the group has is decided by its log in the database. There may be several groups, one for each kind of key;
an HSM is in one. Name the one that is meant with --group.`,
		a.hsmGroup(), a.hsmStatus(), a.hsmVerify(), a.hsmEnroll(), a.hsmReplace(), a.hsmBackup(), a.hsmRestore(), a.hsmRotate(), a.hsmRotatePIN(), a.hsmPolicy(), a.hsmActivate())
	c.AddCommand(a.hsmMemberVerbs()...)
	return a.groupFlags(c)
}

func (a *app) hsmStatus() *cobra.Command {
	var wait time.Duration
	c := &cobra.Command{
		Use:   "status",
		Short: "Show every group: members, and which keys each has just proved to hold",
		Long: `Show every group, or that of --group: members, and which keys each has just proved to hold. Every member is asked to sign a fresh challenge
with every live key; nothing else is done to it.

  joining       not asked yet, or its enrolment has not been finished: no work
  syncing       well, and has not proved every key: work for the keys it proved
  active        well, every key proved
  standby       the same; signs only while no active member can
  suspect       did not answer in time, or erred: work only when nobody else is left
  failed        does not answer, waits for its PIN, or is not the token that was enrolled
  recovering    answers again, and is tried
  drained       gets no work by an operator's wish, until "pkictl hsm recover"
  quarantined   signed something wrong, or its token refuses the PIN: no work until "pkictl hsm recover", or replace

The exit code is 1 unless every member is active or standby.` + groupHelp,
		Args: cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) (groupsView, error) {
			s, err := a.openSite()
			if err != nil {
				return groupsView{}, err
			}
			defer s.close()
			var names []string
			if a.group != "" {
				if err = s.choose(ctx); err == nil {
					names = []string{s.group}
				}
			} else {
				if names, _, err = s.groups(ctx); err == nil && len(names) == 0 {
					err = errNoGroup
				}
			}
			if err != nil {
				return groupsView{}, err
			}
			return s.status(ctx, names, wait)
		}, printStatus),
	}
	c.Flags().DurationVar(&wait, "wait", 5*time.Second, "how long to wait for members that have not answered yet")
	return c
}

// printStatus shows the members, and then a row for each key with a column for each member.
func printStatus(w io.Writer, st groupsView) {
	now := time.Now()
	for _, g := range st.Groups {
		fmt.Fprintf(w, "group %s, log position %d\n\nMEMBER\tSTATE\tSITE\tIN FLIGHT\tPROVED\tLAG\tTOKEN\tADDRESS\tCAUSE\n", g.Name, g.Epoch)
		for _, m := range g.Members {
			proved := 0
			for _, k := range m.Keys {
				if k.ProvedAt != nil {
					proved++
				}
			}
			state := m.State
			if m.Standby && state != "standby" {
				state += " (standby)"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d of %d\t%.0f s\t%s\t%s\t%s\n", m.Name, state, dash(m.Site), m.InFlight, proved, len(m.Keys), m.LagS, dash(m.TokenSerial), m.Address, m.Cause)
		}
		fmt.Fprint(w, "\nKEY\tPURPOSE\tLABEL")
		for _, m := range g.Members {
			fmt.Fprint(w, "\t"+strings.ToUpper(m.Name))
		}
		fmt.Fprintln(w)
		for i, k := range keysOf(g) {
			fmt.Fprintf(w, "%s\t%s\t%s", k.ID, k.Purpose, k.Label)
			for _, m := range g.Members {
				fmt.Fprint(w, "\t"+proof(m, i, now))
			}
			fmt.Fprintln(w)
		}
		for _, m := range g.Members {
			for _, d := range m.Drift {
				fmt.Fprintf(w, "\ndrift on %s: %s", m.Name, d)
			}
			printPIN(w, m.Name, m.PIN)
		}
		fmt.Fprintln(w)
	}
}

// keysOf lists the group's live keys: every member has a row for each, in the same order.
func keysOf(g groupView) []hsmsync.KeyStatus {
	if len(g.Members) == 0 {
		return nil
	}
	return g.Members[0].Keys
}

// proof is what a member has to show for the i-th key.
func proof(m memberView, i int, now time.Time) string {
	if i >= len(m.Keys) {
		return "-"
	}
	switch k := m.Keys[i]; {
	case k.ProvedAt != nil:
		return "proved " + now.Sub(*k.ProvedAt).Round(100*time.Millisecond).String() + " ago"
	case k.State == "unverified":
		return "not proved"
	default:
		return k.State
	}
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// groupsView is what `hsm status` prints: the group as it proves itself to this process, and how each member's keys compare with the log.
type groupsView struct {
	Groups []groupView `json:"groups"`
}

type groupView struct {
	hsmsync.GroupStatus
	Members []memberView `json:"members"`
}

type memberView struct {
	hsmsync.MemberStatus
	// LagS is for how many seconds the member has lacked a key that the group has; 0 when it lacks none, or cannot be asked.
	LagS float64 `json:"lag_s"`
	// Drift is what the member holds otherwise than the log says.
	Drift []string `json:"drift"`
}

// status follows the groups until every member has either proved its keys or failed, or for as long as wait.
func (s *groupSite) status(ctx context.Context, names []string, wait time.Duration) (groupsView, error) {
	groups, err := hsmsync.NewGroups(hsmsync.Config{
		Identity: s.id, Manifest: s.record, Log: slog.New(slog.DiscardHandler), // what is not well is in the status
	})
	if err != nil {
		return groupsView{}, err
	}
	for _, name := range names {
		if _, err := groups.Group(name); err != nil {
			return groupsView{}, err
		}
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	run, following := errgroup.WithContext(ctx)
	run.Go(func() error { return s.store.Run(following) })
	run.Go(func() error { return groups.Run(following) })
	for end := time.Now().Add(wait); !settled(groups.Status()) && time.Now().Before(end) && following.Err() == nil; {
		time.Sleep(20 * time.Millisecond)
	}
	view := s.compare(following, groups.Status())
	stop()
	if err := run.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return groupsView{}, err
	}
	well := true
	for _, g := range view.Groups {
		if g.Epoch == 0 {
			return view, fmt.Errorf("the log of group %s could not be read within %s: `pkictl health` says how the database is", g.Name, wait)
		}
		for _, m := range g.Members {
			well = well && (m.State == "active" || m.State == "standby")
		}
	}
	if !well {
		return view, errQuiet
	}
	return view, nil
}

// settled tells whether waiting would show nothing new.
func settled(st hsmsync.Status) bool {
	for _, g := range st.Groups {
		if g.Epoch == 0 {
			return false // the log has not been read
		}
		for _, m := range g.Members {
			if slices.Contains([]string{"joining", "syncing", "suspect", "recovering"}, m.State) {
				return false
			}
		}
	}
	return true
}

// compare asks every member that answers what it holds.
func (s *groupSite) compare(ctx context.Context, st hsmsync.Status) groupsView {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	view := groupsView{Groups: []groupView{}}
	for _, g := range st.Groups {
		log, err := s.logOf(ctx, g.Name)
		gv := groupView{GroupStatus: g, Members: make([]memberView, len(g.Members))}
		var asking sync.WaitGroup
		for i, m := range g.Members {
			gv.Members[i] = memberView{MemberStatus: m, Drift: []string{}}
			if err == nil && m.Incarnation != "" && m.State != "failed" {
				asking.Go(func() { s.drift(ctx, log, &gv.Members[i]) })
			}
		}
		asking.Wait()
		view.Groups = append(view.Groups, gv)
	}
	return view
}

// logOf is what the log of some group amounts to.
func (s *groupSite) logOf(ctx context.Context, group string) (*hsmsync.State, error) {
	entries, err := s.record.Log(ctx, group, 1)
	if err != nil {
		return nil, err
	}
	return hsmsync.Fold(entries)
}

// drift compares one member with the log: by the digest over its keys, and only where that differs key by key.
func (s *groupSite) drift(ctx context.Context, log *hsmsync.State, m *memberView) {
	client := agent.NewClient(m.Name, m.Address, s.id)
	defer client.Close()
	info, err := client.Health(ctx)
	if err != nil {
		return // its state says so
	}
	wanted := map[hsm.KeyID]hsmsync.ManifestKey{}
	var records []hsm.KeyRecord
	for _, k := range log.In(hsmsync.StateLive, hsmsync.StateRetired) {
		wanted[k.ID] = k
		records = append(records, k.KeyRecord)
	}
	if info.Foreign == 0 && info.Faulty == 0 && info.Digest == hsm.InventoryDigest(records) {
		return
	}
	held, err := client.Inventory(ctx)
	if err != nil {
		m.Drift = append(m.Drift, "its keys are not those of the log, and it does not list them: "+err.Error())
		return
	}
	for _, k := range held {
		want, known := wanted[k.ID]
		switch {
		case k.Purpose == hsm.PurposeProbe:
		case k.Foreign:
			m.Drift = append(m.Drift, fmt.Sprintf("foreign object %q", k.Label))
		case k.Fault != "":
			m.Drift = append(m.Drift, fmt.Sprintf("key %s (%s) is broken: %s", k.ID, k.Label, k.Fault))
		case !known:
			m.Drift = append(m.Drift, fmt.Sprintf("key %s (%s) is neither live nor retired", k.ID, k.Label))
		case !bytes.Equal(want.SPKI, k.SPKI) || want.Attributes != k.Attributes:
			m.Drift = append(m.Drift, fmt.Sprintf("key %s (%s) is another one than the group's", k.ID, k.Label))
		}
		delete(wanted, k.ID)
	}
	for _, k := range log.In(hsmsync.StateLive, hsmsync.StateRetired) {
		if _, missing := wanted[k.ID]; missing {
			m.Drift = append(m.Drift, fmt.Sprintf("key %s (%s) is missing", k.ID, k.Label))
			m.LagS = max(m.LagS, math.Round(time.Since(k.Since).Seconds()))
		}
	}
}
