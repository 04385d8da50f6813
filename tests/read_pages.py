"""A page taken apart, for tests."""

from html.parser import HTMLParser

VOID = {"meta", "link"}


class Read(HTMLParser):
    """A page taken apart; fails where an element is closed that is not open.

    elements: tag, text, the tags it stands inside, and attributes of each, in the order in which they end.
    """

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        element = {"tag": tag, "text": "", "inside": [e["tag"] for e in self.open], **dict(attrs)}
        if tag in VOID:
            self.elements.append(element)
        else:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1]["tag"] == tag, f"</{tag}> in {[e['tag'] for e in self.open]}"
        self.elements.append(self.open.pop())

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, *tags):
        return [element for element in self.elements if element["tag"] in tags]
