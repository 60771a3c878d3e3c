"""Which engine a request goes to: what a router sees (`candidates`), how it chooses (`policies`, `prefix`,
`weighted`), which policy a name stands for (`named`), and the router itself (`router`)."""
