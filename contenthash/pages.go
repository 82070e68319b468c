package contenthash

type pageSet struct{}

func (p *pageSet) replaceAll() {}
func (p *pageSet) touch(*node) {}
