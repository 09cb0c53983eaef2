package main

import (
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

const initText = `cluster: lab
node: init
identity: {cert: c, key: k, trust: t}
database: {nodes: ["127.0.0.1:3306"], user: u, password_file: p}
site: here
base_url: http://pki.test
state_dir: d
mac_key_file: m
sync: {cert: c, key: k, trust: t}
hsm: {group: ca, members: [{name: hsmd-a, address: "h:1"}, {name: hsmd-b, address: "h:2"}]}
groups: [{name: root, members: [{name: hsmd-r, address: "h:3"}, {name: hsmd-s, address: "h:4"}]}]
root: {ca: top, subject: Top, group: root}
issuing: [{ca: demo, subject: Demo}]
ocsp_group: ca
`

func TestInitConfigurationNamesGroupsThatItLists(t *testing.T) {
	check := func(text string) error {
		c := &initConfig{}
		if err := yaml.UnmarshalWithOptions([]byte(text), c, yaml.Strict()); err != nil {
			return err
		}
		return c.check()
	}
	if err := check(initText); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ from, to, want string }{
		{"group: ca,", "group: '',", "hsm.group is missing"},
		{"group: ca,", "group: Main,", `group name "Main"`},
		{"group: root}", "group: other}", `group "other" of CA "top"`},
		{"subject: Demo}", "subject: Demo, group: other}", `group "other" of CA "demo"`},
		{"ocsp_group: ca", "ocsp_group: va", `ocsp_group "va"`},
		{"name: root", "name: ca", `group "ca" is listed twice`},
		{"name: root", "name: a/b", "group name"},
		{"name: hsmd-r", "name: hsmd-a", `member "hsmd-a" is in groups "ca" and "root"`},
		{"h:3", "h", "groups[0].members[0].address"},
		{`, members: [{name: hsmd-r, address: "h:3"}, {name: hsmd-s, address: "h:4"}]}`, "}", "groups[0].members is missing"},
	} {
		if err := check(strings.Replace(initText, test.from, test.to, 1)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s instead of %s: %v", test.to, test.from, err)
		}
	}
}
