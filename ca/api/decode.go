package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"os"
	"strings"
	"unicode/utf8"

	"trivet/problem"
)

const (
	maxBody  = 64 << 10 // octets of a request body
	maxDepth = 8        // of nested JSON values
)

// decode reads a JSON body into v and is strict about all of it: media type, size, UTF-8, unknown and repeated names, depth, trailing data.
func decode(w http.ResponseWriter, r *http.Request, v any) *problem.Problem {
	return decodeUpTo(w, r, v, maxBody)
}

// decodeUpTo is decode with a bound of its own.
func decodeUpTo(w http.ResponseWriter, r *http.Request, v any, most int64) *problem.Problem {
	if p := mustBeJSON(r); p != nil {
		return p
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, most))
	if err != nil {
		if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
			return problem.New(http.StatusRequestEntityTooLarge, "too-large", fmt.Sprintf("the body is over %d octets", most))
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return problem.New(http.StatusRequestTimeout, "request-timeout", "the body took too long to arrive: send the whole request at once, and again")
		}
		return problem.New(http.StatusBadRequest, "malformed-request", "the body ended before its time")
	}
	return decodeJSON(body, v)
}

func mustBeJSON(r *http.Request) *problem.Problem {
	kind, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	charset, given := params["charset"]
	switch {
	case err != nil, kind != "application/json", len(params) > 1, len(params) == 1 && !given, given && !strings.EqualFold(charset, "utf-8"):
		p := problem.New(http.StatusUnsupportedMediaType, "unsupported-media-type", "send the body as Content-Type: application/json")
		p.Field = "Content-Type"
		return p
	case r.Header.Get("Content-Encoding") != "":
		p := problem.New(http.StatusUnsupportedMediaType, "unsupported-media-type", "send the body without Content-Encoding")
		p.Field = "Content-Encoding"
		return p
	}
	return nil
}

func decodeJSON(body []byte, v any) *problem.Problem {
	if !utf8.Valid(body) { // encoding/json would replace what is not, and so change names that get signed
		return problem.New(http.StatusBadRequest, "malformed-request", "the body is not UTF-8")
	}
	if p := walk(body); p != nil {
		return p
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return decodeProblem(err)
	}
	return nil
}

// walk checks what encoding/json lets pass: names given twice, of which it takes the last; names in another case, which it takes as well;
// nesting; and data after the value.
func walk(body []byte) *problem.Problem {
	dec := json.NewDecoder(bytes.NewReader(body))
	type level struct {
		object bool
		name   bool // the next token is a name
		seen   map[string]bool
	}
	var levels []level
	for first := true; first || len(levels) > 0; first = false {
		token, err := dec.Token()
		if err != nil {
			return decodeProblem(err)
		}
		if n := len(levels); n > 0 && levels[n-1].object && levels[n-1].name {
			if name, is := token.(string); is {
				switch top := &levels[n-1]; {
				case name != strings.ToLower(name):
					return unknownField(name)
				case top.seen[name]:
					p := problem.New(http.StatusBadRequest, "malformed-request", "the field is given twice")
					p.Field = clip(name)
					return p
				default:
					top.seen[name], top.name = true, false
				}
				continue
			}
		}
		switch token {
		case json.Delim('{'), json.Delim('['):
			if len(levels) == maxDepth {
				return problem.New(http.StatusBadRequest, "malformed-request", fmt.Sprintf("the body nests deeper than %d", maxDepth))
			}
			object := token == json.Delim('{')
			levels = append(levels, level{object: object, name: object, seen: map[string]bool{}})
			continue
		case json.Delim('}'), json.Delim(']'):
			levels = levels[:len(levels)-1]
		}
		if n := len(levels); n > 0 {
			levels[n-1].name = levels[n-1].object
		}
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return problem.New(http.StatusBadRequest, "malformed-request", "the body goes on after its JSON value")
	}
	return nil
}

func decodeProblem(err error) *problem.Problem {
	var kind *json.UnmarshalTypeError
	switch name, unknown := strings.CutPrefix(err.Error(), "json: unknown field "); {
	case unknown:
		return unknownField(strings.Trim(name, `"`))
	case errors.As(err, &kind):
		p := problem.New(http.StatusBadRequest, "malformed-request", "the value is a "+kind.Value+", which the field does not take")
		p.Field = kind.Field
		return p
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return problem.New(http.StatusBadRequest, "malformed-request", "the body is not a whole JSON value")
	}
	return problem.New(http.StatusBadRequest, "malformed-request", "the body cannot be read as JSON: "+clip(err.Error()))
}

func unknownField(name string) *problem.Problem {
	p := problem.New(http.StatusBadRequest, "malformed-request", "the field is not known; names are lower case and no other field is taken")
	p.Field = clip(name)
	return p
}

// clip bounds what is sent back of a client's own words.
func clip(s string) string {
	const most = 120
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
