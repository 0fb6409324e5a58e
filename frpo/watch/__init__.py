"""`frpo watch`: a live page of one run, from the files of its folder alone. It writes nothing there and holds
no lock, so that it may also look at a folder that another machine's is copied to.

    tail, folder -> describe -> view (records) -> page -> server
"""
