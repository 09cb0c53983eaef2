package db

import (
	"context"
	"database/sql"
	"strings"
	"time"
)

// Generation is one key of a CA. What changes about it is its Log.
type Generation struct {
	Issuer     string // "{ca}-g{generation}"
	CA         string
	Generation uint32
	Parent     string // itself for a root
	KeyGroup   string
	KeyID      string
	SPKI       []byte
	Created    time.Time

	Log []GenerationEvent // by n; filled in by Generations, ignored by InsertGeneration
}

// Events of a generation's chain.
const (
	EventCertificate = "certificate"
	EventState       = "state"
)

// GenerationEvent is a certificate or a state that a generation got. It is appended to a lane (see Fact).
type GenerationEvent struct {
	Issuer     string
	N          uint32 // from 1
	Event      string // EventCertificate or EventState
	State      string // pending | active | suspended | retired | revoked | expired | external; "" with a certificate
	CertIssuer string // where the certificate's outcome is
	CertSerial []byte
	DER        []byte
	Created    time.Time
}

// State returns the generation's present state: "pending" until an event says otherwise.
func (g *Generation) State() string {
	for i := len(g.Log) - 1; i >= 0; i-- {
		if g.Log[i].State != "" {
			return g.Log[i].State
		}
	}
	return "pending"
}

// Certificate returns the DER of the generation's newest certificate, nil if it has none.
func (g *Generation) Certificate() []byte {
	for i := len(g.Log) - 1; i >= 0; i-- {
		if g.Log[i].Event == EventCertificate {
			return g.Log[i].DER
		}
	}
	return nil
}

// Responder is a generation's OCSP responder certificate and key; the one with the highest N is in use. It is appended to a
// lane (see Fact).
type Responder struct {
	Issuer     string
	N          uint32 // from 1
	KeyGroup   string
	KeyID      string
	CertSerial []byte
	DER        []byte
	Created    time.Time
}

const (
	generationColumns    = "issuer, ca, generation, parent, key_group, key_id, spki, created"
	generationLogColumns = "issuer, n, event, state, cert_issuer, cert_serial, der, created"
	responderColumns     = "issuer, n, key_group, key_id, cert_serial, der, created"
)

var (
	generationTable    = &table{name: "generation", columns: strings.Split(generationColumns, ", "), key: 1}
	generationLogTable = &table{name: "generation_log", columns: strings.Split(generationLogColumns, ", "), key: 2}
	responderTable     = &table{name: "responder", columns: strings.Split(responderColumns, ", "), key: 2}
)

func (g *GenerationEvent) row(string, uint64) []any {
	return []any{g.Issuer, g.N, g.Event, g.State, g.CertIssuer, notNull(g.CertSerial), notNull(g.DER), micros(g.Created)}
}

func (r *Responder) row(string, uint64) []any {
	return []any{r.Issuer, r.N, r.KeyGroup, r.KeyID, notNull(r.CertSerial), notNull(r.DER), micros(r.Created)}
}

// InsertGeneration commits a generation. Duplicate: it exists, with another key or content.
func (s *Store) InsertGeneration(ctx context.Context, g Generation) error {
	if g.Created.IsZero() {
		g.Created = s.cfg.Now()
	}
	return s.insertOne(ctx, generationTable, []any{g.Issuer, g.CA, g.Generation, g.Parent, g.KeyGroup, g.KeyID, g.SPKI, micros(g.Created)})
}

// Generations returns all generations with their logs, ordered by CA and number, from one causal view.
func (s *Store) Generations(ctx context.Context) ([]Generation, error) {
	var out []Generation
	_, err := s.Read(ctx, "generations", "", func(ctx context.Context, c *sql.Conn) error {
		return Snapshot(ctx, c, func(tx *sql.Tx) error {
			out = nil
			at := map[string]int{}
			if err := query(ctx, tx, func(r *sql.Rows) error {
				var g Generation
				err := r.Scan(&g.Issuer, &g.CA, &g.Generation, &g.Parent, &g.KeyGroup, &g.KeyID, &g.SPKI, &g.Created)
				at[g.Issuer] = len(out)
				out = append(out, g)
				return err
			}, "SELECT "+generationColumns+" FROM generation ORDER BY ca, generation"); err != nil {
				return err
			}
			return query(ctx, tx, func(r *sql.Rows) error {
				var e GenerationEvent
				if err := r.Scan(&e.Issuer, &e.N, &e.Event, &e.State, &e.CertIssuer, &e.CertSerial, &e.DER, &e.Created); err != nil {
					return err
				}
				if i, ok := at[e.Issuer]; ok {
					out[i].Log = append(out[i].Log, e)
				}
				return nil
			}, "SELECT "+generationLogColumns+" FROM generation_log ORDER BY issuer, n")
		})
	})
	return out, err
}

// Responders returns every responder of every generation, ordered by issuer and n, causally read.
func (s *Store) Responders(ctx context.Context) ([]Responder, error) {
	var out []Responder
	_, err := s.Read(ctx, "responders", "", func(ctx context.Context, c *sql.Conn) error {
		out = nil
		return query(ctx, c, func(r *sql.Rows) error {
			var p Responder
			err := r.Scan(&p.Issuer, &p.N, &p.KeyGroup, &p.KeyID, &p.CertSerial, &p.DER, &p.Created)
			out = append(out, p)
			return err
		}, "SELECT "+responderColumns+" FROM responder ORDER BY issuer, n")
	})
	return out, err
}
