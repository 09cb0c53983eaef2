package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"trivet/ops/galera"
)

// What becomes of the database when all of its nodes are down. The nodes are all on this machine, so that the supervisor can do what an
// operator of several machines does with `pkictl galera inspect` and `choose`; the decision is the same code's.

// refusalPatience is how long a refusal stands before the nodes are looked at again: somebody may have brought a disk back.
const refusalPatience = 10 * time.Second

// decide says how the nodes start when none of them has a process: one founds, or all find together. The caller holds mu.
func (d *database) decide(ctx context.Context) error {
	if d.refusal != nil && time.Since(d.refusedAt) < refusalPatience {
		return d.refusal
	}
	found, err := galera.Survey(ctx, d.nodes)
	if err != nil {
		return err
	}
	plan, err := galera.Choose(found, d.accept)
	var no *galera.Refusal
	if errors.As(err, &no) {
		if d.refusal == nil || d.refusal.Error() != no.Error() {
			d.log.Error("all database nodes are down, and none may be chosen to start from", "why", no.Error())
		}
		d.refusal, d.refusedAt = no, time.Now()
		return no
	}
	if err != nil {
		return err
	}
	d.refusal = nil
	if plan.Reunion && !d.lost {
		d.log.Info("all database nodes were down; each remembers the others, they find together")
		return nil
	}
	if err := galera.Prime(ctx, d.node(plan.Bootstrap), plan); err != nil {
		return err
	}
	d.log.Warn("all database nodes were down; one founds the cluster anew", "node", plan.Bootstrap, "position", plan.Position.String(),
		"new_history", plan.NewHistory, "given_up", plan.GivenUp, "why", strings.Join(plan.Reasons, "; "))
	d.seed, d.lost, d.accept = plan.Bootstrap, false, galera.Accept{}
	return nil
}

// survey inspects the nodes; those that have a process, or are about to, are not disturbed.
func (d *database) survey(ctx context.Context) ([]galera.Inspection, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []galera.Inspection
	for _, n := range d.nodes {
		look := galera.Inspect
		if d.up[n.Name] {
			look = galera.Glance
		}
		in, err := look(ctx, n)
		if err != nil {
			return nil, err
		}
		out = append(out, in)
	}
	return out, nil
}

// recover takes an operator's word for a start that was refused. The nodes then start by themselves within moments.
func (d *database) recover(ctx context.Context, accept galera.Accept, dry bool) (galera.Plan, error) {
	found, err := d.survey(ctx)
	if err != nil {
		return galera.Plan{}, err
	}
	plan, err := galera.Choose(found, accept)
	if err != nil || dry {
		return plan, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.accept, d.refusal, d.lost = accept, nil, true
	return plan, nil
}

// handleDatabase serves what `pkictl galera` asks of a demo.
func (s *supervisor) handleDatabase(mux *http.ServeMux) {
	answer := func(w http.ResponseWriter, v any, err error) {
		var no *galera.Refusal
		switch {
		case errors.As(err, &no):
			_ = json.NewEncoder(w).Encode(recovery{Refusal: no})
		case err != nil:
			http.Error(w, err.Error(), http.StatusConflict)
		default:
			_ = json.NewEncoder(w).Encode(v)
		}
	}
	mux.HandleFunc("GET /database", func(w http.ResponseWriter, r *http.Request) {
		found, err := s.galera.survey(r.Context())
		answer(w, found, err)
	})
	mux.HandleFunc("POST /database/recover", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		dry := q.Get("dry") == "true"
		plan, err := s.galera.recover(r.Context(), galera.Accept{Without: q["without"], Loss: q.Get("loss") == "true"}, dry)
		if err == nil && !dry {
			s.log.Warn("told to recover the database", "without", q["without"], "from", plan.Bootstrap)
			for _, u := range s.of(RoleDB) {
				u.set(func() { u.wanted, u.died = true, "" })
			}
		}
		answer(w, recovery{Plan: &plan}, err)
	})
}

type recovery struct {
	Plan    *galera.Plan    `json:"plan,omitempty"`
	Refusal *galera.Refusal `json:"refusal,omitempty"`
}

// InspectDatabase finds out what each database node knows; running ones are not disturbed.
func (c *Cluster) InspectDatabase(ctx context.Context) ([]galera.Inspection, error) {
	var found []galera.Inspection
	return found, c.control.call(ctx, http.MethodGet, "/database", nil, &found)
}

// RecoverDatabase starts the database when all of its nodes are down, which the supervisor does by itself unless something is missing: then
// accept says what is given up. With dry it only says what it would do. A *galera.Refusal says what is missing.
func (c *Cluster) RecoverDatabase(ctx context.Context, accept galera.Accept, dry bool) (galera.Plan, error) {
	q := url.Values{"without": slices.Clone(accept.Without), "loss": {fmt.Sprint(accept.Loss)}, "dry": {fmt.Sprint(dry)}}
	var r recovery
	if err := c.control.call(ctx, http.MethodPost, "/database/recover", q, &r); err != nil {
		return galera.Plan{}, err
	}
	if r.Refusal != nil {
		return galera.Plan{}, r.Refusal
	}
	return *r.Plan, nil
}
