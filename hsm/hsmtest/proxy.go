package hsmtest

import (
	"net"
	"sync"
	"time"
)

// Proxy is the network before a member: whoever uses Addr instead of the member's can be cut off from it.
type Proxy struct {
	// Addr is where the member seems to be.
	Addr   string
	target string
	listen net.Listener
	wg     sync.WaitGroup

	mu       sync.Mutex
	cut      [2]chan struct{} // open channels stop what goes to the member, and what comes back
	refusing bool
	delay    time.Duration
	conns    map[net.Conn]bool
	closed   bool
}

const (
	toMember = iota
	fromMember
)

// Proxy stands before m until the test ends. At first everything passes.
func (l *Lab) Proxy(m *Member) *Proxy {
	l.t.Helper()
	p := &Proxy{target: m.Addr, listen: l.listen(), conns: map[net.Conn]bool{}}
	p.Addr = p.listen.Addr().String()
	p.Heal()
	p.wg.Go(p.accept)
	l.t.Cleanup(p.close)
	return p
}

// Cut is a partition: nothing passes either way, and connections stay open. What is under way arrives after Heal.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hold(toMember)
	p.hold(fromMember)
}

// CutAnswers lets requests through and no answer back: things are done, and nobody hears of it.
func (p *Proxy) CutAnswers() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hold(fromMember)
}

// Refuse ends every connection, and new ones at once, as a machine does on which nothing listens.
func (p *Proxy) Refuse() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refusing = true
	p.reset()
}

// Delay makes every piece of data take that much longer each way.
func (p *Proxy) Delay(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay = d
}

// Heal takes everything back.
func (p *Proxy) Heal() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refusing, p.delay = false, 0
	for i, c := range p.cut {
		if c == nil || !over(c) {
			p.release(i)
		}
	}
}

func (p *Proxy) hold(way int) {
	if over(p.cut[way]) {
		p.cut[way] = make(chan struct{})
	}
}

func (p *Proxy) release(way int) {
	if p.cut[way] == nil {
		p.cut[way] = make(chan struct{})
	}
	close(p.cut[way])
}

func over(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// reset ends every connection, with nothing more sent. The caller holds mu.
func (p *Proxy) reset() {
	for c := range p.conns {
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		_ = c.Close()
	}
}

func (p *Proxy) close() {
	p.Heal()
	p.mu.Lock()
	p.closed = true
	_ = p.listen.Close()
	p.reset()
	p.mu.Unlock()
	p.wg.Wait()
}

func (p *Proxy) accept() {
	for {
		c, err := p.listen.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.serve(c) })
	}
}

// add counts a connection; it may be refused.
func (p *Proxy) add(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns[c] = true
	if p.refusing || p.closed {
		p.reset()
		return false
	}
	return true
}

func (p *Proxy) forget(c net.Conn) {
	_ = c.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
}

func (p *Proxy) serve(client net.Conn) {
	defer p.forget(client)
	if !p.add(client) || !p.wait(toMember) {
		return
	}
	member, err := net.DialTimeout("tcp", p.target, 10*time.Second)
	if err != nil {
		if tcp, ok := client.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		return
	}
	defer p.forget(member)
	if !p.add(member) {
		return
	}
	var both sync.WaitGroup
	both.Go(func() { p.pump(member, client, toMember) })
	both.Go(func() { p.pump(client, member, fromMember) })
	both.Wait()
}

// pump carries data one way until either end is gone.
func (p *Proxy) pump(to, from net.Conn, way int) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if !p.wait(way) {
				return
			}
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			p.wait(way) // an end does not pass a partition either
			return
		}
	}
}

// wait returns when data may pass; false means that the proxy is closed.
func (p *Proxy) wait(way int) bool {
	for {
		p.mu.Lock()
		gate, delay, closed := p.cut[way], p.delay, p.closed
		p.mu.Unlock()
		if closed {
			return false
		}
		if !over(gate) {
			<-gate
			continue
		}
		time.Sleep(delay)
		return true
	}
}
