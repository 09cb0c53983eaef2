package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"trivet/cluster"
)

func (a *app) demoCommand() *cobra.Command {
	return group("demo", "Run a whole installation on this machine",
		`Run a whole installation on this machine: three database nodes, three HSM agents with a SoftHSM token each, two CA nodes, two
responders and a balancer, as plain processes on loopback addresses, with everything they write in one directory. No container engine is
needed, and root is not either.

A part that dies by itself is restarted after a second. A part ended by kill or stopped by freeze stays so until start or thaw. Further HSM
agents come and go with add and remove, and wipe makes an HSM new and starts it.`,
		a.demoUp(), a.demoTry(), a.demoStatus(),
		a.demoVerb("kill", "End a part with SIGKILL; it stays away until start", (*cluster.Cluster).Kill),
		a.demoVerb("freeze", "Stop a part with SIGSTOP: its connections stay open and nothing answers", (*cluster.Cluster).Freeze),
		a.demoVerb("thaw", "Let a frozen part go on", (*cluster.Cluster).Thaw),
		a.demoStart(), a.demoAdd(), a.demoRemove(), a.demoWipe(), a.demoLogs(), a.demoDown(), a.demoSupervise())
}

func (a *app) demoUp() *cobra.Command {
	var network string
	var groups []string
	c := &cobra.Command{
		Use:   "up",
		Short: "Start the demo, and wait until it can issue",
		Long: `Start the demo, and wait until it can issue. A running demo is left as it is; a stopped one starts again with its data. Two demos fit on
one machine if each has its own --dir and --network.

With --groups root,ca,va the root key and the responders' keys are in HSM groups of their own, with two HSM agents each.`,
		Example: `  pkictl demo up
  pkictl demo up --groups root,ca,va
  pkictl demo up --dir /var/tmp/second --network 127.78.0.0/16`,
		Args: cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) (cluster.Status, error) {
			began := time.Now()
			_, err := cluster.NewLayout(a.dir, network)
			if err == nil {
				err = cluster.CheckGroups(groups)
			}
			if err != nil {
				return cluster.Status{}, usageError{err}
			}
			cl, err := cluster.Up(ctx, cluster.Options{Dir: a.dir, Network: network, Groups: groups, Progress: a.err})
			if err != nil {
				return cluster.Status{}, err
			}
			a.sayf("up after %.1f s", time.Since(began).Seconds())
			return cl.Status()
		}, printEndpoints),
	}
	c.Flags().StringSliceVar(&groups, "groups", nil, "HSM groups: ca, and root and va if wanted (default ca)")
	_ = c.RegisterFlagCompletionFunc("groups", cobra.FixedCompletions([]string{"root,ca,va"}, cobra.ShellCompDirectiveNoFileComp))
	c.Flags().StringVar(&network, "network", "", "loopback /16 for the addresses (default "+cluster.DefaultNetwork+")")
	return c
}

// printEndpoints says where everything is, and what to paste.
func printEndpoints(w io.Writer, st cluster.Status) {
	r := st.Credentials.Requester
	fmt.Fprintf(w, "API\t%s\tissue and revoke: mTLS\n", strings.Join(st.Endpoints.API, " "))
	fmt.Fprintf(w, "public\t%s\tOCSP, CRL, issuer certificates: plain HTTP\n", strings.Join(st.Endpoints.Public, " "))
	fmt.Fprintf(w, "admin\t%s\teach CA node: end-to-end mTLS\n", strings.Join(st.Endpoints.Admin, " "))
	fmt.Fprintf(w, "database\t%s\tread-only as %s, password in %s\n", strings.Join(st.Database.Nodes, " "), st.Database.User, st.Database.PasswordFile)
	fmt.Fprintf(w, "files\t%s\n", st.Dir)
	if len(st.CAs) == 0 {
		return
	}
	ca := st.CAs[0]
	fmt.Fprintf(w, `
# a key and a request of your own
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout demo.key -subj / -addext subjectAltName=DNS:www.example.org -out demo.csr

# a certificate, with pkictl or with curl
%[10]s cert issue --csr demo.csr --out demo.pem%[7]s
curl -sS --cacert %[1]s --cert %[2]s --key %[3]s -H 'Content-Type: application/json' -H 'Idempotency-Key: my-first' \
  -d '{"profile": "tls-server", "csr": "'"$(sed -z 's/\n/\\n/g' demo.csr)"'"}' %[4]s/v1/certificates

# what others think of it
openssl verify -CAfile %[5]s demo.pem
openssl ocsp -issuer %[6]s -cert demo.pem -CAfile %[5]s -no_nonce -url %[8]s
curl -s %[9]s | openssl crl -inform der -noout -text

# take something away and try again
%[10]s demo kill ca1%[7]s && %[10]s demo try%[7]s; %[10]s demo start ca1%[7]s; %[10]s health%[7]s
%[10]s demo down%[7]s
`, st.Credentials.Trust, r.Cert, r.Key, st.Endpoints.API[0], ca.Chain, ca.Certificate, dirFlag(st), ca.OCSP, ca.CRL, program())
}

// program is pkictl as it was called, for lines to paste.
func program() string {
	if name := os.Args[0]; filepath.Base(name) == "pkictl" {
		return name
	}
	return "pkictl"
}

// dirFlag is what later commands need to find the same demo.
func dirFlag(st cluster.Status) string {
	if l, err := cluster.NewLayout("", ""); err == nil && l.Dir == st.Dir {
		return ""
	}
	return " --dir " + st.Dir
}

func (a *app) demoStatus() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show what runs, and where everything is", Args: cobra.NoArgs,
		Long: "Show what runs, and where everything is. The JSON form is stable: programs may rely on it.",
		RunE: do(a, func(context.Context, []string) (cluster.Status, error) {
			cl, err := cluster.Open(a.dir)
			if errors.Is(err, os.ErrNotExist) {
				a.sayf("%v", err)
				l, err := cluster.NewLayout(a.dir, "")
				return cluster.Describe(l), err
			}
			if err != nil {
				return cluster.Status{}, err
			}
			return cl.Status()
		}, func(w io.Writer, st cluster.Status) {
			fmt.Fprintf(w, "%s in %s on %s\n\nNAME\tROLE\tSTATE\tPID\tADDRESSES\n", st.State, st.Dir, st.Network)
			for _, p := range st.Processes {
				var addresses []string
				for _, name := range []string{"api", "admin", "public", "internal", "status", "agent", "mysql"} {
					if addr := p.Addresses[name]; addr != "" {
						addresses = append(addresses, name+" "+addr)
					}
				}
				pid := "-"
				if p.PID != 0 {
					pid = strconv.Itoa(p.PID)
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", p.Name, p.Role, p.State, pid, strings.Join(addresses, ", "))
			}
		}),
	}
}

// outcome is what a verb did to a part.
type outcome struct {
	Name  string `json:"name"`
	State string `json:"state"`
}

func printOutcomes(w io.Writer, done []outcome) {
	for _, o := range done {
		fmt.Fprintf(w, "%s\t%s\n", o.Name, o.State)
	}
}

// demoVerb is a command that does one thing to each named part.
func (a *app) demoVerb(verb, short string, act func(*cluster.Cluster, string) error) *cobra.Command {
	return &cobra.Command{
		Use: verb + " NAME…", Short: short, Args: cobra.MinimumNArgs(1), ValidArgsFunction: partNames,
		RunE: do(a, func(_ context.Context, names []string) ([]outcome, error) {
			cl, err := cluster.Open(a.dir)
			if err != nil {
				return nil, err
			}
			for _, name := range names {
				if _, err := cl.Layout().Part(name); err != nil {
					return nil, usageError{err}
				}
			}
			for _, name := range names {
				if err := act(cl, name); err != nil {
					return nil, err
				}
			}
			return outcomes(cl, names)
		}, printOutcomes),
	}
}

func outcomes(cl *cluster.Cluster, names []string) ([]outcome, error) {
	st, err := cl.Status()
	if err != nil {
		return nil, err
	}
	var done []outcome
	for _, name := range names {
		for _, p := range st.Processes {
			if p.Name == name {
				done = append(done, outcome{Name: name, State: p.State})
			}
		}
	}
	return done, nil
}

func (a *app) demoStart() *cobra.Command {
	var wait time.Duration
	c := a.demoVerb("start", "Start a part that was killed, and wait until it is ready", nil)
	c.RunE = do(a, func(ctx context.Context, names []string) ([]outcome, error) {
		cl, err := cluster.Open(a.dir)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if _, err := cl.Layout().Part(name); err != nil {
				return nil, usageError{err}
			}
		}
		for _, name := range names {
			if err := cl.Start(name); err != nil {
				return nil, err
			}
		}
		if wait > 0 {
			ctx, cancel := context.WithTimeout(ctx, wait)
			defer cancel()
			for _, name := range names {
				if err := cl.AwaitReady(ctx, name); err != nil {
					return nil, err
				}
			}
		}
		return outcomes(cl, names)
	}, printOutcomes)
	c.Flags().DurationVar(&wait, "wait", time.Minute, "how long to wait until it is ready; 0 does not wait")
	return c
}

func (a *app) demoDown() *cobra.Command {
	var keep bool
	c := &cobra.Command{
		Use:   "down",
		Short: "End the demo and remove everything it wrote",
		Long: `End the demo and remove everything it wrote: no process, no port, no file is left. With --keep the parts end in good order and the
directory stays; "pkictl demo up" starts them again with the same data.`,
		Args: cobra.NoArgs,
		RunE: do(a, func(context.Context, []string) (cluster.Status, error) {
			cl, err := cluster.Open(a.dir)
			if errors.Is(err, os.ErrNotExist) {
				l, lerr := cluster.NewLayout(a.dir, "")
				a.sayf("there is no demo in %s", l.Dir)
				return cluster.Describe(l), lerr
			}
			if err != nil {
				return cluster.Status{}, err
			}
			if keep {
				if err := cl.Stop(); err != nil {
					return cluster.Status{}, err
				}
				a.sayf("stopped; the data stays in %s", cl.Layout().Dir)
			} else {
				if err := cl.Down(); err != nil {
					return cluster.Status{}, err
				}
				a.sayf("ended; %s is removed", cl.Layout().Dir)
			}
			return cluster.Describe(cl.Layout()), nil
		}, func(io.Writer, cluster.Status) {}),
	}
	c.Flags().BoolVar(&keep, "keep", false, "keep the data, for the next `up`")
	return c
}

// partLog is the end of one part's log.
type partLog struct {
	Name  string   `json:"name"`
	File  string   `json:"file"`
	Lines []string `json:"lines"`
}

func (a *app) demoLogs() *cobra.Command {
	var lines int
	var follow bool
	c := &cobra.Command{
		Use: "logs [NAME…]", Short: "Show the end of the parts' logs", ValidArgsFunction: partNames,
		Long: "Show the end of the parts' logs; of all of them, and of supervisor and init, if none is named.",
		RunE: do(a, func(ctx context.Context, names []string) ([]partLog, error) {
			cl, err := cluster.Open(a.dir)
			if err != nil {
				return nil, err
			}
			l := cl.Layout()
			if len(names) == 0 {
				names = []string{"supervisor", "init"}
				for _, p := range l.Parts() {
					names = append(names, p.Name)
				}
			}
			var logs []partLog
			for _, name := range names {
				if _, err := l.Part(name); err != nil && name != "supervisor" && name != "init" {
					return nil, usageError{err}
				}
				log := partLog{Name: name, File: l.Log(name), Lines: []string{}}
				if text := cluster.Tail(log.File, lines); text != "" {
					log.Lines = strings.Split(text, "\n")
				}
				logs = append(logs, log)
			}
			if !follow {
				return logs, nil
			}
			if len(names) != 1 || a.output != "text" {
				return nil, usagef("--follow: name one part, and have it as text")
			}
			return nil, followFile(ctx, logs[0].File, a.out)
		}, func(w io.Writer, logs []partLog) {
			for _, log := range logs {
				if len(logs) > 1 {
					fmt.Fprintf(w, "== %s: %s\n", log.Name, log.File)
				}
				for _, line := range log.Lines {
					fmt.Fprintln(w, line)
				}
			}
		}),
	}
	c.Flags().IntVarP(&lines, "lines", "n", 10, "how many lines of each")
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on as the log grows")
	return c
}

// followFile copies what is appended to a file until ctx ends.
func followFile(ctx context.Context, file string, w io.Writer) error {
	f, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("opening the log: %w", err)
	}
	defer f.Close()
	if _, err := f.Seek(0, io.SeekEnd); err != nil {
		return fmt.Errorf("reading the log: %w", err)
	}
	for r := bufio.NewReader(f); ; {
		if _, err := r.WriteTo(w); err != nil {
			return fmt.Errorf("copying the log: %w", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// demoSupervise is the process that `demo up` leaves behind.
func (a *app) demoSupervise() *cobra.Command {
	var binaries string
	c := &cobra.Command{
		Use: "supervise", Short: "Run the supervisor of a prepared demo", Hidden: true, Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			a.began = true
			cl, err := cluster.Open(a.dir)
			if err != nil {
				return err
			}
			return cluster.Supervise(c.Context(), cluster.SuperviseConfig{
				Layout: cl.Layout(), Binaries: binaries, Log: slog.New(slog.NewJSONHandler(a.err, nil)),
			})
		},
	}
	c.Flags().StringVar(&binaries, "binaries", "", "directory of ca, ocsp, lb, hsmd and pkictl")
	return c
}

// partNames completes the names of parts.
func partNames(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	l, err := cluster.NewLayout("", "")
	if cl, cerr := cluster.Open(""); cerr == nil {
		l, err = cl.Layout(), nil
	}
	var names []string
	if err == nil {
		for _, p := range l.Parts() {
			names = append(names, p.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
