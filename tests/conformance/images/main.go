// A registry on loopback with stand-ins of every image that critest pulls, made of this host's static busybox and of the
// programs in ../standin:
//
//	images BUSYBOX STANDIN
//
// It prints its address, and the digest of one image, and serves until its standard input ends.
package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "images: %v\n", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("usage: images BUSYBOX STANDIN")
	}
	files := programs{}
	var err error
	if files.busybox, err = os.ReadFile(args[0]); err != nil {
		return fmt.Errorf("reading busybox: %w", err)
	}
	if files.applets, err = applets(args[0]); err != nil {
		return fmt.Errorf("asking busybox for its applets: %w", err)
	}
	if files.standin, err = os.ReadFile(args[1]); err != nil {
		return fmt.Errorf("reading the stand-in programs: %w", err)
	}
	all := newRegistry()
	if err := addImages(all, files); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listening on loopback: %w", err)
	}
	fmt.Printf("%s %s\n", listener.Addr(), all.digest(digested))
	go func() {
		// Whoever started this has ended, or closed it.
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	return http.Serve(listener, all)
}
