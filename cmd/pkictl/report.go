package main

import (
	"fmt"
	"io"
	"strings"

	"trivet/hsmsync"
)

// printReport shows what verify found out, member by member.
func printReport(w io.Writer, r hsmsync.Report) {
	fmt.Fprintf(w, "group %s, log position %d, domain key %s\n\nMEMBER\tPLACE\tTOKEN\tKEYS\tPROVED\tDIGEST\n", r.Group, r.Position, r.Domain)
	for _, m := range r.Members {
		proved := 0
		for _, k := range r.Keys {
			if k.Copies[m.Name].Proved {
				proved++
			}
		}
		if !m.Reached {
			fmt.Fprintf(w, "%s\t%s\t-\t-\t-\tnot reached\n", m.Name, m.State)
			continue
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d of %d\t%.16s\n", m.Name, m.State, m.TokenSerial, m.Keys, proved, len(r.Keys), m.Digest)
	}
	if len(r.Retired) > 0 {
		fmt.Fprint(w, "\nRETIRED KEY\tPURPOSE\tLABEL\tCOPIES, COMPARED AND NOT PROVED\n")
		for _, k := range r.Retired {
			held := strings.Join(k.Holders, ", ")
			if held == "" {
				held = "none"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", k.ID, k.Purpose, k.Label, held)
		}
	}
	if len(r.Findings) > 0 {
		fmt.Fprint(w, "\nFINDING\tMEMBER\tALARM\tDETAIL\n")
		for _, f := range r.Findings {
			alarm := "no"
			if f.Alarm {
				alarm = "yes"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", f.Kind, dash(f.Member), alarm, f.Detail)
		}
	}
	if len(r.Covers) > 0 {
		fmt.Fprintln(w)
	}
	for _, line := range r.Covers {
		fmt.Fprintln(w, line)
	}
	if r.OK {
		fmt.Fprintln(w, "\nevery copy is what the log says, and each of a live key is proved")
	}
}
