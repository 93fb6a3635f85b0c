package main

import (
	"fmt"
	"os/exec"
	"strings"
)

const (
	e2e     = "e2e-test-images/"
	staging = "k8s-staging-cri-tools/"
	// The image whose digest is told: the one of critest is of an image that only the real registry has.
	digested = staging + "test-image-digest:latest"
)

// programs is what images are made of.
type programs struct {
	busybox, standin []byte
	applets          []string
}

// Users and groups that critest names: its images are Debian's and busybox' own.
const (
	passwd = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n" +
		"default-user:x:1000:1000::/tmp:/bin/sh\n"
	group = "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n"
	// Debian's busybox lacks these two.
	pgrep = "#!/bin/sh\nfor dir in /proc/[0-9]*; do read -r name 2>/dev/null <$dir/comm && case $name in *$1*) echo ${dir#/proc/};; esac; done\n"
	ipcs  = "#!/bin/sh\nexec cat /proc/sysvipc/shm\n"
)

func applets(busybox string) ([]string, error) {
	list, err := exec.Command(busybox, "--list").Output()
	return strings.Fields(string(list)), err
}

// base is the layer that every image has but those of a single program.
func base(from programs) []file {
	files := []file{
		{name: "bin/", mode: 0o755}, {name: "dev/", mode: 0o755}, {name: "etc/", mode: 0o755},
		{name: "proc/", mode: 0o755}, {name: "root/", mode: 0o700}, {name: "sys/", mode: 0o755},
		{name: "tmp/", mode: 0o1777}, {name: "mnt/", mode: 0o755}, {name: "usr/", mode: 0o755},
		{name: "usr/sbin/", mode: 0o755}, {name: "var/", mode: 0o755}, {name: "var/lib/", mode: 0o755},
		{name: "var/run/", mode: 0o755},
		{name: "etc/passwd", mode: 0o644, content: []byte(passwd)},
		{name: "etc/group", mode: 0o644, content: []byte(group)},
		{name: "bin/busybox", mode: 0o755, content: from.busybox},
		{name: "bin/pgrep", mode: 0o755, content: []byte(pgrep)},
		{name: "bin/ipcs", mode: 0o755, content: []byte(ipcs)},
	}
	for _, applet := range from.applets {
		if applet != "busybox" {
			files = append(files, file{name: "bin/" + applet, mode: 0o777, target: "busybox"})
		}
	}
	return files
}

func addImages(to *registry, from programs) error {
	busybox, err := to.addLayer(base(from))
	if err != nil {
		return err
	}
	program := func(path string, mode int64) (layer, error) {
		return to.addLayer([]file{{name: path, mode: mode, content: from.standin}})
	}
	nginx, err := program("usr/sbin/nginx", 0o755)
	if err != nil {
		return err
	}
	httpd, err := program("usr/sbin/httpd", 0o755)
	if err != nil {
		return err
	}
	nnp, err := program("nnp", 0o4755)
	if err != nil {
		return err
	}
	pause, err := program("pause", 0o755)
	if err != nil {
		return err
	}
	shell := process{Cmd: []string{"sh"}}
	image := func(name string, does process, layers ...layer) {
		err = firstOf(err, to.addImage(name, does, append([]layer{busybox}, layers...)...))
	}
	image(e2e+"busybox:1.29-2", shell)
	image(e2e+"nginx:1.14-2", process{Cmd: []string{"/usr/sbin/nginx"}}, nginx)
	image(e2e+"httpd:2.4.39-4", process{Cmd: []string{"/usr/sbin/httpd"}}, httpd)
	image(e2e+"nonewprivs:1.3", process{Entrypoint: []string{"/nnp"}}, nnp)
	image(staging+"hostnet-nginx-amd64:latest", process{Env: []string{"PORT=12003"}, Cmd: []string{"/usr/sbin/nginx"}}, nginx)
	err = firstOf(err, to.addImage("pause:3.9", process{Entrypoint: []string{"/pause"}}, pause))
	for user, name := range map[string]string{"1002": "uid", "www-data": "username", "1003:users": "uid-group", "www-data:100": "username-group"} {
		image(staging+"test-image-user-"+name+":latest", process{User: user, Cmd: shell.Cmd})
	}
	image(staging+"test-image-predefined-group:latest", process{User: "1000", Cmd: shell.Cmd})
	// Distinct images, but for the one with three tags.
	for _, name := range []string{"latest:latest", "tag:test", "tag:all", "digest:latest", "1:latest", "2:latest", "3:latest"} {
		image(staging+"test-image-"+name, process{Cmd: shell.Cmd, Labels: map[string]string{"test": name}})
	}
	for tag := range 3 {
		image(fmt.Sprintf("%stest-image-tags:%d", staging, tag+1), process{Cmd: shell.Cmd, Labels: map[string]string{"test": "tags"}})
	}
	return err
}

func firstOf(first, second error) error {
	if first != nil {
		return first
	}
	return second
}
