package lb

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// Listeners holds the addresses to listen on, host:port.
type Listeners struct {
	API    string `yaml:"api"`    // HTTPS, TLS 1.3, client certificate optional: /v1
	Public string `yaml:"public"` // plain HTTP: /ocsp, /crl, /ca and nothing else
	Status string `yaml:"status"` // mTLS: /livez, /readyz, /healthz, /metrics, /lb/state
}

// NewServer returns a server with the bounds that all listeners share: headers of 8 KiB, 5 s to send them, 10 s for the whole request, 30 s to take the
// answer; HTTP/1.1 alone.
func NewServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       75 * time.Second,
		MaxHeaderBytes:    maxHeader - 4<<10, // net/http allows 4 KiB more than it is told
		TLSNextProto:      map[string]func(*http.Server, *tls.Conn, http.Handler){},
		ErrorLog:          slog.NewLogLogger(log.With("from", "http").Handler(), slog.LevelDebug), // broken clients are the network's everyday
	}
}

// Endpoint is an address, what it serves, and its TLS configuration, or nil for plain HTTP.
type Endpoint struct {
	Address string
	Handler http.Handler
	TLS     *tls.Config
}

// Serve listens on all endpoints, calls ready, and serves until ctx ends or one fails. Then it stops accepting, lets requests finish for up to
// grace, and returns.
func Serve(ctx context.Context, endpoints []Endpoint, grace time.Duration, log *slog.Logger, ready func()) error {
	var open []net.Listener
	for _, e := range endpoints {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", e.Address)
		if err != nil {
			for _, l := range open {
				l.Close()
			}
			return fmt.Errorf("listening: %w", err)
		}
		if e.TLS != nil {
			l = tls.NewListener(l, e.TLS)
		}
		open = append(open, l)
	}
	failed := make(chan error, len(endpoints))
	var servers []*http.Server
	for i, e := range endpoints {
		s := NewServer(e.Handler, log)
		servers = append(servers, s)
		go func() { failed <- s.Serve(open[i]) }()
	}
	ready()
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
		err = fmt.Errorf("serving: %w", err)
	}
	// Not derived from ctx, which has ended: this is what follows its end.
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	done := make(chan error, len(servers))
	for _, s := range servers {
		go func() {
			e := s.Shutdown(stop)
			if e != nil {
				s.Close()
				e = fmt.Errorf("requests were still under way after %s: %w", grace, e)
			}
			done <- e
		}()
	}
	for range servers {
		err = errors.Join(err, <-done)
	}
	return err
}
