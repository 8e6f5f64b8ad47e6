from bdcli.cli import main

main()
