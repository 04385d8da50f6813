"""Pages for people: one HTML file each, that needs no server and no network, and the figures in them."""
