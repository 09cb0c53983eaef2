package journal

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
)

// about is what of a payload is looked at in passing. Field names are those of the payloads.
type about struct {
	Issuer string `json:"issuer"`
	Serial string `json:"serial"`
	Lane   string `json:"lane"`
	Seq    uint64 `json:"seq"`
	Kind   string `json:"kind"` // of done
	Ver    int    `json:"ver"`
	Number uint64 `json:"number"`
	Event  string `json:"event"` // of audit
	Object string `json:"object"`
	Owner  string `json:"owner"` // of promise; Object is then the incarnation, empty where copies are not required

	held *held // of held
}

func (a *about) id() string { return a.Issuer + ":" + a.Serial }

// about returns what New remembered, or decodes it. Other kinds have none; an audit record that is no JSON has none either.
func (r Record) about() (about, error) {
	if r.known != nil {
		return *r.known, nil
	}
	var a about
	switch r.Kind {
	case KindAudit:
		var p Audit
		if json.Unmarshal(r.Payload, &p) == nil {
			a.Event, a.Object = p.Event, p.Object
		}
	case KindHeld:
		var err error
		if a.held, err = readHeld(r.Payload); err != nil {
			return a, err
		}
	case KindPromise:
		var p Promise
		if err := json.Unmarshal(r.Payload, &p); err != nil {
			return a, fmt.Errorf("decoding a %s record: %w", r.Kind, err)
		}
		a.Owner = p.Owner
		if p.CopyRequired {
			a.Object = p.Incarnation
		}
	case KindIntent, KindSign, KindDone, KindVoid, KindCRL:
		var p struct {
			about
			Event json.RawMessage `json:"event"` // of a done it is an object
		}
		if a, ok := skim(r.Payload); ok {
			return a, nil
		}
		if err := json.Unmarshal(r.Payload, &p); err != nil {
			return a, fmt.Errorf("decoding a %s record: %w", r.Kind, err)
		}
		a = p.about
	}
	return a, nil
}

// skim reads a JSON object of strings, numbers, booleans and objects written by New, passing over the objects: most records are that, most of each is one long string, and a start has
// many to look at. Anything else it leaves to the real decoder.
func skim(b []byte) (a about, ok bool) {
	if len(b) < 2 || b[0] != '{' || b[len(b)-1] != '}' {
		return about{}, false
	}
	for b = b[1 : len(b)-1]; ; b = b[1:] {
		name, rest, ok := quoted(b)
		if !ok || len(rest) < 2 || rest[0] != ':' || !plainText(name) || !bytes.Equal(name, bytes.ToLower(name)) {
			return about{}, false
		}
		var text string
		var number uint64
		if b = rest[1:]; b[0] == '"' {
			value, rest, ok := quoted(b)
			if !ok {
				return about{}, false
			}
			switch {
			case len(value) < maxSkimmed && plainText(value):
				text = string(value)
			case bytes.IndexByte(value, '\\') >= 0 || wanted(string(name)):
				return about{}, false
			}
			b = rest
		} else if b[0] == '{' {
			if b, ok = behindObject(b); !ok {
				return about{}, false
			}
		} else {
			end := bytes.IndexByte(b, ',')
			if end < 0 {
				end = len(b)
			}
			var err error
			if number, err = strconv.ParseUint(string(b[:end]), 10, 64); err != nil && string(b[:end]) != "true" {
				return about{}, false
			}
			b = b[end:]
		}
		switch string(name) {
		case "issuer":
			a.Issuer = text
		case "serial":
			a.Serial = text
		case "lane":
			a.Lane = text
		case "seq":
			a.Seq = number
		case "kind":
			a.Kind = text
		case "ver":
			a.Ver = int(number)
		case "number":
			a.Number = number
		}
		if len(b) == 0 {
			return a, true
		}
		if b[0] != ',' {
			return about{}, false
		}
	}
}

// behindObject returns what follows the JSON object at the start of b.
func behindObject(b []byte) ([]byte, bool) {
	for depth, i := 0, 0; i < len(b); i++ {
		switch b[i] {
		case '{':
			depth++
		case '}':
			if depth--; depth == 0 {
				return b[i+1:], true
			}
		case '\\':
			return nil, false
		case '"':
			end := bytes.IndexByte(b[i+1:], '"')
			if end < 0 || bytes.IndexByte(b[i+1:i+1+end], '\\') >= 0 {
				return nil, false
			}
			i += end + 1
		}
	}
	return nil, false
}

// maxSkimmed bounds the fields of about, in bytes; longer ones are TBS and DER.
const maxSkimmed = 256

func wanted(name string) bool {
	switch name {
	case "issuer", "serial", "lane", "kind":
		return true
	}
	return false
}

// plainText tells whether b is printable ASCII without escapes, which means itself.
func plainText(b []byte) bool {
	for _, c := range b {
		if c < ' ' || c > '~' || c == '\\' {
			return false
		}
	}
	return true
}

// quoted splits a JSON string from what follows. It takes the first quote for the end: whoever finds a backslash within must not believe it.
func quoted(b []byte) (value, rest []byte, ok bool) {
	if len(b) < 2 || b[0] != '"' {
		return nil, nil, false
	}
	end := bytes.IndexByte(b[1:], '"')
	if end < 0 {
		return nil, nil, false
	}
	return b[1 : 1+end], b[end+2:], true
}

// aboutOf returns what is worth remembering of a payload that was just encoded, or nil.
func aboutOf(payload any) *about {
	switch p := payload.(type) {
	case Intent:
		return &about{Issuer: p.Issuer, Serial: p.Serial}
	case Sign:
		return &about{Issuer: p.Issuer, Serial: p.Serial}
	case Void:
		return &about{Issuer: p.Issuer, Serial: p.Serial}
	case CRL:
		return &about{Issuer: p.Issuer, Number: p.Number}
	case Held:
		if h, err := heldOf(&p); err == nil {
			return &about{held: h}
		}
	case Audit:
		return &about{Event: p.Event, Object: p.Object}
	case Done:
		return &about{Issuer: p.Issuer, Serial: p.Serial, Lane: p.Lane, Seq: p.Seq, Kind: p.Kind, Ver: p.Ver}
	}
	return nil
}
