"""From a folder of pictures to items with a caption, a size and a crop.

`find` collects pictures and their captions from a folder (`folder`, `metadata`) or from rows with an image column
(`rows`), `decode` turns any file into upright 8-bit RGB, `buckets` chooses the size a picture is trained at, `item` is
one picture as training sees it, `read` puts these together, `cache` keeps what is computed of a picture on disk, and
`show` prints what was read (`analysis.contact_sheet` draws it). Nothing here knows about models or training.
"""
