package db_test

import (
	"bytes"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
)

// fault is what the proxy does to one COMMIT.
type fault int

const (
	none      fault = iota
	cutBefore       // the node never sees it
	cutAfter        // the node does it; the client never hears of it
	hold            // the client is cut off; the node sees it at release
)

// proxy passes MySQL's protocol on and interferes with COMMIT.
type proxy struct {
	addr string
	then func() // called when a fault was applied, before the client is cut off

	to      string
	mu      sync.Mutex
	fault   fault
	hit     int
	closed  bool // new connections are refused
	conns   map[net.Conn]bool
	held    chan struct{} // closed at release
	pending sync.WaitGroup
}

func newProxy(t *testing.T, to string) *proxy {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{addr: ln.Addr().String(), to: to, held: make(chan struct{}), conns: map[net.Conn]bool{}}
	t.Cleanup(func() {
		ln.Close()
		p.refuse(true)
	})
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go p.serve(c)
		}
	}()
	return p
}

// next sets the fault of the next COMMIT.
func (p *proxy) next(f fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = f
}

func (p *proxy) hits() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.hit
}

// refuse makes the node unreachable, or reachable again.
func (p *proxy) refuse(yes bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = yes
	if yes {
		for c := range p.conns {
			c.Close()
		}
	}
}

// release lets held COMMITs through, and returns when the node has answered them.
func (p *proxy) release() {
	close(p.held)
	p.pending.Wait()
}

func (p *proxy) serve(client net.Conn) {
	defer client.Close()
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return
	}
	p.conns[client] = true
	p.mu.Unlock()
	server, err := net.Dial("tcp", p.to)
	if err != nil {
		return
	}
	var mu sync.Mutex
	holding := false
	defer func() {
		mu.Lock()
		defer mu.Unlock()
		if !holding {
			server.Close()
		}
	}()
	var drop sync.Mutex // held: answers are not passed on
	dropping := false
	answered := make(chan struct{}, 1)
	go func() {
		defer client.Close()
		buf := make([]byte, 64<<10)
		for {
			n, err := server.Read(buf)
			drop.Lock()
			d := dropping
			drop.Unlock()
			if d {
				select {
				case answered <- struct{}{}:
				default:
				}
			} else if n > 0 {
				if _, err := client.Write(buf[:n]); err != nil {
					return
				}
			}
			if err != nil {
				select {
				case answered <- struct{}{}:
				default:
				}
				return
			}
		}
	}()
	for {
		packet, err := readPacket(client)
		if err != nil {
			return
		}
		f := none
		if bytes.Equal(packet[4:], []byte("\x03COMMIT")) {
			p.mu.Lock()
			if f = p.fault; f != none {
				p.fault, p.hit = none, p.hit+1
			}
			p.mu.Unlock()
		}
		if f != none {
			drop.Lock()
			dropping = true
			drop.Unlock()
		}
		switch f {
		case cutAfter:
			server.Write(packet)
			<-answered
		case hold:
			mu.Lock()
			holding = true
			mu.Unlock()
			p.pending.Add(1)
			go func() {
				defer p.pending.Done()
				<-p.held
				server.Write(packet)
				<-answered
				server.Close()
			}()
		case none:
			if _, err := server.Write(packet); err != nil {
				return
			}
			continue
		}
		if p.then != nil {
			p.then()
		}
		return
	}
}

// readPacket reads one packet of MySQL's protocol with its header.
func readPacket(r io.Reader) ([]byte, error) {
	head := make([]byte, 4)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, err
	}
	n := int(head[0]) | int(head[1])<<8 | int(head[2])<<16
	packet := append(head, make([]byte, n)...)
	_, err := io.ReadFull(r, packet[4:])
	return packet, err
}

// transfers reports whether a node's log tells of a full state transfer.
func transfers(t *testing.T, log string) bool {
	t.Helper()
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(b), "rsync SST completed on joiner")
}
