package cluster

import (
	"os"
	"path/filepath"
)

// States of a cluster and of its processes.
const (
	Running  = "running"
	Degraded = "degraded" // of a cluster: starting, or some part is not running
	Stopped  = "stopped"  // nobody is to start it; of a cluster: no supervisor
	Frozen   = "frozen"   // SIGSTOP
	Failed   = "failed"   // died by itself and is about to be restarted
)

// Status is what `pkictl demo status --output json` prints. The names are a contract with programs.
type Status struct {
	State       string      `json:"state"` // running, degraded, stopped
	Dir         string      `json:"dir"`
	Network     string      `json:"network"`
	Endpoints   Endpoints   `json:"endpoints"`
	Credentials Credentials `json:"credentials"`
	CAs         []CAStatus  `json:"cas"`
	Database    DBStatus    `json:"database"`
	Processes   []Process   `json:"processes"`
}

// Endpoints are base URLs.
type Endpoints struct {
	API    []string `json:"api"`    // issuing, through the balancer
	Public []string `json:"public"` // OCSP, CRL, issuer certificates: plain HTTP
	Admin  []string `json:"admin"`  // each CA node's own listener: end-to-end mTLS
}

// KeyPair names the files of one identity.
type KeyPair struct {
	Cert string `json:"cert"`
	Key  string `json:"key"`
}

// Credentials are the people of the demo, a key pair each.
type Credentials struct {
	Trust     string    `json:"trust"` // PEM of the infrastructure CA
	Requester KeyPair   `json:"requester"`
	RA        KeyPair   `json:"ra"`
	Operators []KeyPair `json:"operators"`
	Admins    []KeyPair `json:"admins"`
	Auditor   KeyPair   `json:"auditor"`
	SRE       KeyPair   `json:"sre"`
}

// CAStatus is one issuing CA.
type CAStatus struct {
	ID          string `json:"id"`
	Generation  int    `json:"generation"`
	Certificate string `json:"certificate"` // PEM file
	Chain       string `json:"chain"`       // PEM file: the certificate and what is above it, up to the root
	OCSP        string `json:"ocsp"`
	CRL         string `json:"crl"`
}

// DBStatus is how to read the record.
type DBStatus struct {
	Nodes        []string `json:"nodes"`
	Name         string   `json:"name"`
	User         string   `json:"user"` // may read everything and write nothing
	PasswordFile string   `json:"password_file"`
}

// Process is one part of the cluster.
type Process struct {
	Name      string            `json:"name"`
	Role      string            `json:"role"`
	Site      string            `json:"site"`
	PID       int               `json:"pid"` // 0 when there is none
	State     string            `json:"state"`
	Addresses map[string]string `json:"addresses"`
	Dir       string            `json:"dir"`
	Log       string            `json:"log"`
}

// Describe is the Status of a cluster at l of which nothing runs.
func Describe(l Layout) Status {
	pair := func(name string) KeyPair {
		return KeyPair{Cert: filepath.Join(l.Identity(name), "cert.pem"), Key: filepath.Join(l.Identity(name), "key.pem")}
	}
	s := Status{
		State: Stopped, Dir: l.Dir, Network: l.Network,
		Endpoints: Endpoints{API: []string{l.APIURL()}, Public: []string{l.PublicURL()}},
		Credentials: Credentials{
			Trust:     filepath.Join(l.Identity("requester"), "trust.pem"),
			Requester: pair("requester"), RA: pair("ra"),
			Operators: []KeyPair{pair("operator1"), pair("operator2")},
			Admins:    []KeyPair{pair("admin1"), pair("admin2")},
			Auditor:   pair("auditor"), SRE: pair("sre"),
		},
		CAs:      []CAStatus{},
		Database: DBStatus{Name: Database, User: "auditor", PasswordFile: l.Secret("db-auditor")},
	}
	for _, p := range l.role(RoleCA) {
		s.Endpoints.Admin = append(s.Endpoints.Admin, "https://"+p.Addresses["admin"])
	}
	for _, p := range l.role(RoleDB) {
		s.Database.Nodes = append(s.Database.Nodes, p.Addresses["mysql"])
	}
	ca := CAStatus{
		ID: CA, Generation: Generation,
		Certificate: filepath.Join(l.Published(), Issuer+".pem"),
		Chain:       filepath.Join(l.Published(), Issuer+"-chain.pem"),
		OCSP:        l.PublicURL() + "/ocsp/" + CA,
		CRL:         l.PublicURL() + "/crl/" + Issuer + ".crl",
	}
	if _, err := os.Stat(ca.Chain); err == nil {
		s.CAs = append(s.CAs, ca)
	}
	for _, p := range l.Parts() {
		s.Processes = append(s.Processes, Process{Name: p.Name, Role: p.Role, Site: p.Site, State: Stopped, Addresses: p.Addresses, Dir: p.Dir, Log: p.Log})
	}
	return s
}

// overall is running only when every process is.
func overall(processes []Process) string {
	for _, p := range processes {
		if p.State != Running {
			return Degraded
		}
	}
	return Running
}
