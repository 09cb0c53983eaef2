package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"
)

// tick of the processor times in /proc: USER_HZ, which is 100 on every Linux that Go runs on (proc(5)).
const tick = 10 * time.Millisecond

// cpuTable is the processor time that each role's processes have taken, the load generator's own under "client".
type cpuTable map[string]cpuTime

type cpuTime struct{ user, system time.Duration }

// cpu reads what every running process of the cluster, and this one, has taken since it started.
func (s *site) cpu(ctx context.Context) (cpuTable, error) {
	st, err := s.status(ctx)
	if err != nil {
		return nil, err
	}
	table := make(cpuTable)
	for _, p := range st.Processes {
		if p.PID == 0 {
			continue // stopped for the measurement
		}
		t, err := cpuOf(p.PID)
		if err != nil {
			return nil, fmt.Errorf("processor time of %s: %w", p.Name, err)
		}
		sum := table[p.Role]
		table[p.Role] = cpuTime{sum.user + t.user, sum.system + t.system}
	}
	var own syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &own); err != nil {
		return nil, fmt.Errorf("own processor time: %w", err)
	}
	table["client"] = cpuTime{time.Duration(own.Utime.Nano()), time.Duration(own.Stime.Nano())}
	return table, nil
}

// cpuOf reads /proc/PID/stat: fields 14 and 15, counted after the command's name, which may hold spaces and brackets.
func cpuOf(pid int) (cpuTime, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return cpuTime{}, err
	}
	fields := bytes.Fields(raw[bytes.LastIndexByte(raw, ')')+1:])
	if len(fields) < 13 {
		return cpuTime{}, fmt.Errorf("%q has too few fields", raw)
	}
	user, err := strconv.ParseInt(string(fields[11]), 10, 64)
	if err != nil {
		return cpuTime{}, err
	}
	system, err := strconv.ParseInt(string(fields[12]), 10, 64)
	if err != nil {
		return cpuTime{}, err
	}
	return cpuTime{time.Duration(user) * tick, time.Duration(system) * tick}, nil
}

// printSince prints what each role took per certificate since an earlier table.
func (t cpuTable) printSince(earlier cpuTable, certificates int) {
	var sum cpuTime
	each := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) / float64(certificates) }
	for _, role := range slices.Sorted(maps.Keys(t)) {
		d := cpuTime{t[role].user - earlier[role].user, t[role].system - earlier[role].system}
		sum = cpuTime{sum.user + d.user, sum.system + d.system}
		fmt.Printf("  cpu %-8s %6.2f ms a certificate (user %.2f, system %.2f)\n", role, each(d.user+d.system), each(d.user), each(d.system))
	}
	fmt.Printf("  cpu %-8s %6.2f ms a certificate (user %.2f, system %.2f)\n", "all", each(sum.user+sum.system), each(sum.user), each(sum.system))
}

// since is what some roles have taken since an earlier table.
func (t cpuTable) since(earlier cpuTable, roles ...string) (sum time.Duration) {
	for _, r := range roles {
		sum += t[r].user - earlier[r].user + t[r].system - earlier[r].system
	}
	return sum
}
