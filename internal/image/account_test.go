package image

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestEnsureUser(t *testing.T) {
	root := "root:x:0:0:root:/root:/bin/bash"
	tests := []struct {
		name string
		in   accounts
		want accounts
		own  owner
	}{
		{
			"a bare system",
			accounts{passwd: []string{root}, group: []string{"root:x:0:"}, shadow: []string{"root:*:1::::::"}},
			accounts{
				passwd: []string{root, "user:x:1000:1000::/home/user:/bin/bash"},
				group:  []string{"root:x:0:", "user:x:1000:", "sudo:x:27:user"},
				shadow: []string{"root:*:1::::::", "user:*:19000:0:99999:7:::"},
			},
			owner{1000, 1000, userHome},
		},
		{
			"1000 is someone else",
			accounts{
				passwd: []string{root, "node:x:1000:1000::/home/node:/bin/bash", "x:x:1001:1::/:/bin/sh"},
				group:  []string{"node:x:1000:", "sudo:x:27:node", "ssl:x:1002:"}, gshadow: []string{"sudo:*::node"},
			},
			accounts{
				passwd: []string{
					root, "node:x:1000:1000::/home/node:/bin/bash", "x:x:1001:1::/:/bin/sh", "user:x:1003:1003::/home/user:/bin/bash",
				},
				group:   []string{"node:x:1000:", "sudo:x:27:node,user", "ssl:x:1002:", "user:x:1003:"},
				gshadow: []string{"sudo:*::node,user", "user:!::"},
			},
			owner{1003, 1003, userHome},
		},
		{
			"the user is there and cannot log in",
			accounts{
				passwd: []string{"user:x:500:600:Me:/srv/me:/usr/sbin/nologin"}, group: []string{"sudo:x:99:user"},
				shadow: []string{"user:secret:1::::::"},
			},
			accounts{
				passwd: []string{"user:x:500:600:Me:/home/user:/bin/bash"}, group: []string{"sudo:x:99:user"},
				shadow: []string{"user:secret:1::::::"},
			},
			owner{500, 600, userHome},
		},
		{
			"the user's line is broken and 27 is taken",
			accounts{passwd: []string{"user:x", "odd"}, group: []string{"tape:x:27:", "user:x:77:"}},
			accounts{
				passwd: []string{"odd", "user:x:77:77::/home/user:/bin/bash"}, group: []string{"tape:x:27:", "user:x:77:", "sudo:x:999:user"},
			},
			owner{77, 77, userHome},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			own := tt.in.ensureUser("/bin/bash")
			if diff := cmp.Diff(tt.want, tt.in, cmp.AllowUnexported(accounts{})); diff != "" {
				t.Errorf("files (-want +got):\n%s", diff)
			}
			if own != tt.own {
				t.Errorf("owner %+v, want %+v", own, tt.own)
			}
		})
	}
}

func FuzzEnsureUser(f *testing.F) {
	f.Add("root:x:0:0:root:/root:/bin/bash\n", "root:x:0:\nsudo:x:27:a,b\n", "root:*:::::::\n")
	f.Add("user:x:1000", "user:x:\nsudo", "")
	f.Add("user:x:9999999999999999999:-1:::", "sudo:::::,,,", ":::")
	f.Fuzz(func(t *testing.T, passwd, group, shadow string) {
		if len(passwd)+len(group) > 1<<16 {
			return
		}
		a := accounts{passwd: lines([]byte(passwd)), group: lines([]byte(group)), shadow: lines([]byte(shadow))}
		others := slices.DeleteFunc(slices.Clone(a.passwd), func(l string) bool { return strings.HasPrefix(l, "user:") })
		own := a.ensureUser("/bin/sh")
		i := find(a.passwd, userName)
		if i < 0 {
			t.Fatal("there is no user")
		}
		if f := fields(a.passwd[i], 7); id(f[2]) != own.uid || id(f[3]) != own.gid || f[5] != userHome {
			t.Errorf("line %q is not of %+v", a.passwd[i], own)
		}
		if left := slices.DeleteFunc(slices.Clone(a.passwd), func(l string) bool { return strings.HasPrefix(l, "user:") }); !slices.Equal(others, left) {
			t.Errorf("other lines changed:\n%s", cmp.Diff(others, left))
		}
		if j := find(a.group, "sudo"); j < 0 || !strings.Contains(a.group[j], userName) {
			t.Error("the user is not in group sudo")
		}
		again := accounts{passwd: slices.Clone(a.passwd), group: slices.Clone(a.group), shadow: slices.Clone(a.shadow)}
		again.ensureUser("/bin/sh")
		if diff := cmp.Diff(a, again, cmp.AllowUnexported(accounts{})); diff != "" {
			t.Errorf("a second time changes more:\n%s", diff)
		}
	})
}
