from frpo.cli import main

main()
