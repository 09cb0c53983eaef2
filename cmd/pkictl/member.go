package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"trivet/cluster"
)

// demoMember is what add says: what somebody needs who wants to enrol the member.
type demoMember struct {
	outcome
	Address string `json:"address"`
}

func (a *app) demoAdd() *cobra.Command {
	var module string
	var env []string
	c := &cobra.Command{
		Use:   "add NAME…",
		Short: "Add an HSM agent with a blank token, hsmd-d to hsmd-z",
		Long: `Add an HSM agent with a blank token, hsmd-d to hsmd-z, and wait until it is ready. It is a part of the demo like any other from then on,
over "demo down --keep" and "demo up", until "demo remove". The HSM group knows nothing of it until it is enrolled; the command to do so is
printed.`,
		Example: `  pkictl demo add hsmd-d
  pkictl hsm enroll hsmd-d --address 127.77.2.4:7443 --approve-as admin1,operator1`,
		Args: cobra.MinimumNArgs(1), ValidArgs: []string{"hsmd-d", "hsmd-e", "hsmd-f"},
		RunE: do(a, func(_ context.Context, names []string) ([]demoMember, error) {
			cl, err := cluster.Open(a.dir)
			if err != nil {
				return nil, err
			}
			for _, name := range names {
				if err := cl.Add(cluster.Added{Name: name, Module: module, Env: env}); err != nil {
					return nil, err
				}
			}
			done, err := outcomes(cl, names)
			if err != nil {
				return nil, err
			}
			var added []demoMember
			for _, o := range done {
				p, err := cl.Layout().Part(o.Name)
				if err != nil {
					return nil, err
				}
				m := demoMember{o, p.Addresses["agent"]}
				which := ""
				if len(cl.Layout().Groups()) > 1 {
					which = " --group " + cluster.KeyGroup
				}
				a.sayf("to enrol it: %s hsm enroll %s --address %s%s --approve-as admin1,operator1%s", program(), m.Name, m.Address, which, dirFlag(cluster.Describe(cl.Layout())))
				added = append(added, m)
			}
			return added, nil
		}, func(w io.Writer, added []demoMember) {
			for _, m := range added {
				fmt.Fprintf(w, "%s\t%s\t%s\n", m.Name, m.State, m.Address)
			}
		}),
	}
	c.Flags().StringVar(&module, "module", "", "PKCS#11 module in place of SoftHSM's")
	c.Flags().StringArrayVar(&env, "env", nil, "NAME=VALUE for the agent's environment")
	for _, name := range []string{"module", "env"} {
		_ = c.Flags().MarkHidden(name) // for tests with faulty modules
	}
	return c
}

func (a *app) demoRemove() *cobra.Command {
	c := a.demoVerb("remove", "Remove an HSM agent that was added, with its token and every key in it", nil)
	c.Long = `Remove an HSM agent that was added, with its token and every key in it: nothing of it is left. Take it out of the HSM group first, with
"pkictl hsm remove NAME"; the group waits for a member that is gone for good otherwise.`
	c.RunE = do(a, func(_ context.Context, names []string) ([]outcome, error) {
		cl, err := cluster.Open(a.dir)
		if err != nil {
			return nil, err
		}
		var done []outcome
		for _, name := range names {
			if err := cl.Remove(name); err != nil {
				return done, err
			}
			done = append(done, outcome{Name: name, State: "removed"})
		}
		return done, nil
	}, printOutcomes)
	return c
}

func (a *app) demoWipe() *cobra.Command {
	c := a.demoVerb("wipe", "Empty the token of an HSM agent and start it: a new HSM under an old name", (*cluster.Cluster).Wipe)
	c.Long = `Empty the token of an HSM agent and start it: a new HSM under an old name, as after a repair or an exchange. Every key in the token is
gone. The HSM group notices that the token is not the one that was enrolled and gives it no work; "pkictl hsm replace NAME" takes it in.`
	return c
}
