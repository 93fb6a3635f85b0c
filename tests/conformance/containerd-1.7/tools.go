//go:build tools

// Package containerd17 names what ../build.sh builds of containerd 1.7: a module of its own, whose requirements are older.
package containerd17

import (
	_ "github.com/containerd/containerd/cmd/containerd"
	_ "github.com/containerd/containerd/cmd/containerd-shim-runc-v2"
	_ "github.com/containerd/containerd/cmd/ctr"
)
