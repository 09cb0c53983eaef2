// Command pkictl is the operator's one tool: it issues and revokes, asks after health, checks the record, initialises an installation, and
// runs a whole one on one machine (`pkictl demo`).
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
