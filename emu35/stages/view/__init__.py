"""Looking at stories: one HTML page that needs nothing else.

Whatever holds a story becomes a :class:`~emu35.stages.view.shown.Shown`, and one page shows any
number of them::

    FILE.pb, folder of .pb files        sources.py
    folder of `emu35 generate`          sources.py     -> Shown ... -> page.py -> PAGE.html
    folder of the official viewer       layout.py                   -> layout.py -> viewer folder

A page is often made from files that somebody else made, so nothing in them is trusted: all text is
escaped, a policy in the page forbids scripts and every request, pictures are decoded before they
are inlined, and a path in a file is followed only within the folder of that file.

Stories are read, and their pictures loaded, one at a time while the page is written; its size is
bounded by the disk rather than by memory. What cannot be shown is named in its place on the page,
and reported to the caller.
"""
