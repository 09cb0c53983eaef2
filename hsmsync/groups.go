package hsmsync

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// Groups is the virtual HSMs of a process that uses several: one Group for each group of which it was ever asked for a key.
// So the record says which those are, in the generations and responders that name a key's group, and a process never speaks
// to the members of a group that it has nothing to do with. All methods are safe for concurrent use.
type Groups struct {
	cfg Config // of each, without a name

	mu     sync.Mutex // guards all below
	all    map[string]*Group
	launch func(*Group) // has a group run; nil while Run does not run
}

// NewGroups makes the groups of one process, none at first. cfg is each group's but for its name and members, which must be
// empty: the groups' logs name those. It connects to nothing.
func NewGroups(cfg Config) (*Groups, error) {
	if cfg.Group != "" || len(cfg.Members) > 0 {
		return nil, errors.New("a configuration for several groups names none of them, and no members")
	}
	named := cfg
	named.Group, named.Metrics = "any", nil
	if _, err := New(named); err != nil { // what is wrong with it is wrong with every group
		return nil, err
	}
	return &Groups{cfg: cfg, all: map[string]*Group{}}, nil
}

// Run runs every group until ctx ends; it then returns nil. It must run exactly once for keys to sign.
func (g *Groups) Run(ctx context.Context) error {
	var running sync.WaitGroup
	g.mu.Lock()
	g.launch = func(one *Group) { running.Go(func() { _ = one.Run(ctx) }) } // never an error
	for _, one := range g.all {
		g.launch(one)
	}
	g.mu.Unlock()
	<-ctx.Done()
	g.mu.Lock()
	g.launch = func(*Group) {} // one that comes now never runs
	g.mu.Unlock()
	running.Wait()
	return nil
}

// Group is the group of that name, followed from the first time on that it is asked for.
func (g *Groups) Group(name string) (*Group, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if one := g.all[name]; one != nil {
		return one, nil
	}
	if err := CheckGroupName(name); err != nil {
		return nil, err
	}
	cfg := g.cfg
	cfg.Group = name
	one, err := New(cfg)
	if err != nil {
		return nil, err
	}
	g.all[name] = one
	if g.launch != nil {
		g.launch(one)
	}
	return one, nil
}

// Key is Group.Key of the group of that name.
func (g *Groups) Key(ctx context.Context, group, id string) (*Key, error) {
	one, err := g.Group(group)
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", id, err)
	}
	return one.Key(ctx, id)
}

// Ready is Group.Ready of the group of that name.
func (g *Groups) Ready(group, id string) (members int, err error) {
	one, err := g.Group(group)
	if err != nil {
		return 0, fmt.Errorf("key %s: %w", id, err)
	}
	return one.Ready(id)
}

// Status tells the state of every group that is in use and was not deleted, by name.
func (g *Groups) Status() Status {
	g.mu.Lock()
	all := maps.Clone(g.all)
	g.mu.Unlock()
	s := Status{Groups: []GroupStatus{}}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if !all[name].deleted() {
			s.Groups = append(s.Groups, all[name].Status().Groups...)
		}
	}
	return s
}

func (g *Group) deleted() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.state.Deleted
}

// Lister tells which groups there are. An error means that nothing was learnt. Record is one.
type Lister interface {
	Groups(ctx context.Context) ([]Known, error)
}

// ReconcileAll runs RunReconcile for every group that list names, from the time on when it does until the group is deleted,
// and returns nil when ctx ends. cfg is each coordinator's but for the group. The list is read as often as a group is
// reconciled; what was read last holds while it cannot be read.
func ReconcileAll(ctx context.Context, cfg CoordinatorConfig, list Lister, interval time.Duration) error {
	if interval <= 0 {
		interval = defaultEvery
	}
	made := map[string]*Coordinator{} // kept when the group goes: metrics are registered once
	defer func() {
		for _, c := range made {
			if c != nil {
				c.Close()
			}
		}
	}()
	var running sync.WaitGroup
	defer running.Wait()
	stops := map[string]context.CancelFunc{}
	defer func() {
		for _, stop := range stops {
			stop()
		}
	}()
	healthy := true
	for {
		all, err := list.Groups(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if (err == nil) != healthy {
			if healthy = err == nil; healthy {
				cfg.Log.Info("the list of HSM groups is read again")
			} else {
				cfg.Log.Warn("the list of HSM groups cannot be read; those known so far are reconciled", "error", err)
			}
		}
		for _, known := range all {
			name, stop := known.Name, stops[known.Name]
			switch {
			case known.Deleted && stop != nil:
				cfg.Log.Info("group is deleted, and reconciled no more", "group", name)
				stop()
				delete(stops, name)
			case known.Deleted || stop != nil:
			default:
				c, tried := made[name]
				if !tried {
					one := cfg
					one.Group = name
					if c, err = NewCoordinator(one); err != nil {
						cfg.Log.Error("group cannot be reconciled", "group", name, "error", err)
						c = nil
					}
					made[name] = c
				}
				if c == nil {
					continue
				}
				until, stop := context.WithCancel(ctx)
				stops[name] = stop
				running.Go(func() { _ = c.RunReconcile(until, interval) }) // never an error
			}
		}
		if !sleep(ctx, interval, nil) {
			return nil
		}
	}
}
