package db_test

import (
	"bytes"
	"cmp"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// fault is what the proxy does to one COMMIT.
type fault int

const (
	none       fault = iota
	cutBefore        // the node never sees it
	cutAfter         // the node does it; the client never hears of it
	hold             // the client is cut off; the node sees it at release
	cutWithin        // the node does it; the client gets the first octets of the answer
	cutCommand       // the node gets the first octets of the command
	swallow          // the node does it; no answer comes, and the connection stays open
)

// proxy passes MySQL's protocol on and interferes with COMMIT.
type proxy struct {
	addr string
	then func() // called when a fault was applied, before the client is cut off

	to string
	on string // the statement to interfere with: what it begins with; COMMIT if ""

	mu      sync.Mutex
	delays  map[string]time.Duration // by text of a query
	hangs   map[string]chan struct{} // closed when over
	waited  int
	quiet   bool // with hold the client is not cut off
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
	p := &proxy{addr: ln.Addr().String(), to: to, held: make(chan struct{}), conns: map[net.Conn]bool{}, delays: map[string]time.Duration{}, hangs: map[string]chan struct{}{}}
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

// delay has a query wait before the node sees it.
func (p *proxy) delay(query string, d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delays[query] = d
}

// delayed counts the queries that waited.
func (p *proxy) delayed() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.waited
}

// keep has hold leave the client its connection.
func (p *proxy) keep() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.quiet = true
}

// hang has a query wait until it does not any more.
func (p *proxy) hang(query string, yes bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if yes {
		p.hangs[query] = make(chan struct{})
	} else if c := p.hangs[query]; c != nil {
		close(c)
		delete(p.hangs, query)
	}
}

// linger does what delay and hang asked for.
func (p *proxy) linger(packet []byte) {
	if len(packet) < 5 || packet[4] != 3 {
		return
	}
	p.mu.Lock()
	d, h := p.delays[string(packet[5:])], p.hangs[string(packet[5:])]
	if d > 0 || h != nil {
		p.waited++
	}
	p.mu.Unlock()
	time.Sleep(d)
	if h != nil {
		<-h
	}
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
	dropping, few := false, false
	answered := make(chan struct{}, 1)
	go func() {
		defer client.Close()
		buf := make([]byte, 64<<10)
		for {
			n, err := server.Read(buf)
			drop.Lock()
			d, f := dropping, few
			drop.Unlock()
			if d {
				if f && n > 3 {
					client.Write(buf[:3])
				}
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
		f, quiet := none, false
		p.linger(packet)
		if bytes.HasPrefix(packet[4:], []byte("\x03"+cmp.Or(p.on, "COMMIT"))) {
			p.mu.Lock()
			if f = p.fault; f != none {
				p.fault, p.hit = none, p.hit+1
			}
			if f == hold {
				p.pending.Add(1) // before anybody can know that it is held
			}
			quiet = p.quiet
			p.mu.Unlock()
		}
		if f != none {
			drop.Lock()
			dropping, few = true, f == cutWithin
			drop.Unlock()
		}
		switch f {
		case cutAfter, cutWithin:
			server.Write(packet)
			<-answered
		case cutCommand:
			server.Write(packet[:len(packet)-2])
		case swallow:
			server.Write(packet)
			<-answered
			p.wait(client)
		case hold:
			mu.Lock()
			holding = true
			mu.Unlock()
			if quiet {
				defer p.wait(client)
			}
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

// wait returns when the client gives up.
func (p *proxy) wait(client net.Conn) { io.Copy(io.Discard, client) }

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
