from arena_distill.cli import main

main()
