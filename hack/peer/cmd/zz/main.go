package main

import (
	"context"
	"os"
	"strconv"

	"github.com/lamina-build/lamina/hack/peer"
)

func main() {
	n, _ := strconv.Atoi(os.Args[2])
	if err := peer.Legacy(context.Background(), os.Args[1], n); err != nil {
		panic(err)
	}
}
