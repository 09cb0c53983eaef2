package api

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/gin-gonic/gin"

	"trivet/ca"
	"trivet/journal"
	"trivet/problem"
)

type entryJSON struct {
	ID      string          `json:"id"`
	Time    time.Time       `json:"time"`
	Kind    string          `json:"kind"`
	Payload json.RawMessage `json:"payload"`
}

type auditJSON struct {
	Entries []entryJSON `json:"entries"`
	Next    *string     `json:"next"`
}

var errPageFull = errors.New("the page is full")

// audit reads this node's journal. That it was read is recorded first.
func (s *server) audit(c *gin.Context) {
	query, limit, p := pageOf(c)
	if p != nil {
		s.fail(c, p)
		return
	}
	after := query["cursor"]
	from, ok := entryPlace(after)
	if after != "" && !ok {
		s.fail(c, malformed("cursor", "it is none that this node gave"))
		return
	}
	if err := s.record(c, "audit-read", "journal", "after "+after); err != nil {
		s.fail(c, err)
		return
	}
	ctx, cancel := context.WithTimeout(c.Request.Context(), s.cfg.ReadTimeout)
	defer cancel()
	page := auditJSON{Entries: []entryJSON{}}
	read := s.cfg.Journal.Replay
	if after != "" {
		read = func(fn func(journal.Entry) error) error { return s.cfg.Journal.Select(journal.Query{From: &from}, fn) }
	}
	err := read(func(e journal.Entry) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		id := hex.EncodeToString(e.Incarnation[:]) + ":" + strconv.FormatUint(e.Offset, 10)
		if len(page.Entries) == limit {
			page.Next = &page.Entries[limit-1].ID
			return errPageFull
		}
		payload := json.RawMessage(e.Payload)
		if !json.Valid(payload) {
			payload, _ = json.Marshal(map[string][]byte{"octets": e.Payload})
		}
		page.Entries = append(page.Entries, entryJSON{ID: id, Time: e.Time.UTC(), Kind: e.Kind.String(), Payload: payload})
		return nil
	})
	switch {
	case errors.Is(err, journal.ErrNoPlace):
		s.fail(c, malformed("cursor", "it is none that this node gave"))
	case errors.Is(err, journal.ErrArchived):
		s.fail(c, malformed("cursor", "what follows it is in the archive alone: read it there with pkictl journal"))
	case err != nil && !errors.Is(err, errPageFull):
		s.fail(c, &ca.Error{Name: ca.JournalUnavailable, Detail: "the journal could not be read to the end of the page: repeat the request", RetryAfter: time.Second, Err: err})
	default:
		c.JSON(http.StatusOK, page)
	}
}

// entryPlace reads an entry's id.
func entryPlace(id string) (p journal.Place, ok bool) {
	incarnation, offset, ok := strings.Cut(id, ":")
	raw, err := hex.DecodeString(incarnation)
	if !ok || err != nil || len(raw) != len(p.Incarnation) {
		return p, false
	}
	p.Incarnation = [16]byte(raw)
	p.Offset, err = strconv.ParseUint(offset, 10, 64)
	return p, err == nil
}

// record writes an act of the caller's to the journal before it happens.
func (s *server) record(c *gin.Context, event, object, detail string) error {
	r, err := journal.New(journal.Audit{Actor: caller(c).String(), Event: event, Object: object, Outcome: "begun", Detail: detail})
	if err == nil {
		err = s.cfg.Journal.Append(r)
	}
	if err != nil {
		return ca.JournalError(err, "this node cannot record what it does")
	}
	return nil
}

// parameters returns the query's parameters. Unknown and repeated ones are refused: a filter that is not applied shows too much.
func parameters(c *gin.Context, known ...string) (map[string]string, *problem.Problem) {
	given, err := url.ParseQuery(c.Request.URL.RawQuery)
	if err != nil {
		return nil, malformed("query", "it cannot be read")
	}
	out := map[string]string{}
	for name, values := range given {
		found := false
		for _, k := range known {
			found = found || k == name
		}
		switch {
		case !found:
			return nil, malformed(clip(name), "the parameter is not known")
		case len(values) != 1:
			return nil, malformed(clip(name), "the parameter is given more than once")
		}
		out[name] = values[0]
	}
	return out, nil
}

const (
	defaultPage = 100
	maxPage     = 1000
)

// pageOf returns the parameters of a question for one page, and how many entries it may have. filters are known besides cursor and limit.
func pageOf(c *gin.Context, filters ...string) (query map[string]string, limit int, p *problem.Problem) {
	if query, p = parameters(c, append(filters, "cursor", "limit")...); p != nil {
		return nil, 0, p
	}
	limit, p = pageLimit(query["limit"])
	return query, limit, p
}

func pageLimit(text string) (int, *problem.Problem) {
	if text == "" {
		return defaultPage, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > maxPage {
		return 0, malformed("limit", fmt.Sprintf("want 1 to %d", maxPage))
	}
	return n, nil
}

func malformed(field, detail string) *problem.Problem {
	p := problem.New(http.StatusBadRequest, ca.MalformedRequest, detail)
	p.Field = field
	return p
}
