package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
)

// caList is the API's list of CAs.
type caList struct {
	CAs []struct {
		ID          string         `json:"id"`
		Active      *int           `json:"active"`
		Generations []caGeneration `json:"generations"`
	} `json:"cas"`
}

type caGeneration struct {
	ID          string     `json:"id"`
	Generation  int        `json:"generation"`
	State       string     `json:"state"`
	Parent      string     `json:"parent"`
	Subject     string     `json:"subject,omitempty"`
	NotBefore   *time.Time `json:"not_before,omitempty"`
	NotAfter    *time.Time `json:"not_after,omitempty"`
	SHA256      string     `json:"sha256,omitempty"`
	Certificate string     `json:"certificate,omitempty"`
	Chain       []string   `json:"chain,omitempty"`
	URLs        struct {
		Certificate string `json:"certificate"`
		CRL         string `json:"crl"`
		OCSP        string `json:"ocsp"`
	} `json:"urls"`
}

func (a *app) caCommand() *cobra.Command {
	list := &cobra.Command{
		Use: "list", Short: "List CAs and their generations", Args: cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) (caList, error) {
			cl, err := a.newClient("requester")
			if err != nil {
				return caList{}, err
			}
			return get[caList](ctx, cl, "/v1/cas")
		}, func(w io.Writer, l caList) {
			fmt.Fprintln(w, "ID\tSTATE\tPARENT\tSUBJECT\tVALID UNTIL\tOCSP\tCRL")
			for _, ca := range l.CAs {
				for _, g := range ca.Generations {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", g.ID, g.State, g.Parent, g.Subject, stamp(g.NotAfter), g.URLs.OCSP, g.URLs.CRL)
				}
			}
		}),
	}
	return a.clientFlags(group("ca", "Look at certificate authorities", "Look at certificate authorities.", list))
}
