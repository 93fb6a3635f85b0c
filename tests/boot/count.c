/*
 * A QEMU plugin that counts the guest's instructions: in all, those at low addresses (user mode, once the kernel
 * runs), and by function of the kernel; and that notes the counts each time a marked function is entered.
 *
 *   -plugin FILE,map=SYSTEM.MAP,marks=NAMES,out=FILE
 *
 * NAMES has one function a line; one that begins with '!' is a point: there the functions' counts since the last point
 * are written too. The output has one line a fact:
 *
 *   mark NAME ALL LOW          the counts when NAME was entered; "(user)" is the first instruction of user mode
 *   hot COUNT NAME             by function, since the last point; before its "mark"
 *   end ALL LOW
 *
 * Only functions that plugins of every version may call are used. Their declarations are our own: Debian does not ship
 * QEMU's header. The guest has one processor, so that nothing here needs a lock.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

/* QEMU's plugin interface, version 1 (QEMU 4.2 to 8.1), as far as it is used. */
typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef struct qemu_info_t qemu_info_t;
enum { QEMU_PLUGIN_CB_NO_REGS = 0 };
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, void (*)(unsigned int, void *), int, void *);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);

EXPORT int qemu_plugin_version = 1;

/* Where the kernel's text is mapped. Before paging it runs at its physical addresses, which are this much less. */
#define KERNEL_MAP 0xffffffff80000000ull

enum mark { NONE, MARK, POINT };

struct function {
	uint64_t address;
	char *name;
	enum mark mark;
	uint64_t count, reported;
};

static struct function *functions;
static size_t function_count;
static struct function low = { .name = "(user)" }, other = { .name = "(unknown)" };
static uint64_t all;
static FILE *out;

static void die(const char *doing, const char *what)
{
	fprintf(stderr, "count plugin: %s %s\n", doing, what);
	exit(1);
}

static int by_address(const void *a, const void *b)
{
	uint64_t left = ((const struct function *)a)->address, right = ((const struct function *)b)->address;

	return left < right ? -1 : left > right;
}

static void read_map(const char *path)
{
	FILE *map = fopen(path, "r");
	char line[512], name[256], type;
	unsigned long long address;
	size_t room = 0;

	if (!map)
		die("opening", path);
	while (fgets(line, sizeof line, map)) {
		if (sscanf(line, "%llx %c %255s", &address, &type, name) != 3 || !strchr("tTwW", type) || address < KERNEL_MAP)
			continue;
		if (function_count == room) {
			room = room ? room * 2 : 4096;
			functions = realloc(functions, room * sizeof *functions);
			if (!functions)
				die("no memory for", path);
		}
		functions[function_count++] = (struct function){ .address = address, .name = strdup(name) };
	}
	fclose(map);
	qsort(functions, function_count, sizeof *functions, by_address);
}

static void read_marks(const char *path)
{
	FILE *marks = fopen(path, "r");
	char line[256];

	if (!marks)
		die("opening", path);
	while (fgets(line, sizeof line, marks)) {
		enum mark mark = line[0] == '!' ? POINT : MARK;
		const char *name = line + (mark == POINT);

		line[strcspn(line, "\n")] = 0;
		for (size_t i = 0; i < function_count; i++) {
			size_t last = i;

			if (strcmp(functions[i].name, name))
				continue;
			/* Of several names for one address, the last one is found. */
			while (last + 1 < function_count && functions[last + 1].address == functions[i].address)
				last++;
			functions[last].name = functions[i].name;
			functions[last].mark = mark;
		}
	}
	fclose(marks);
}

/* The last function that begins at or before the address. */
static struct function *function_at(uint64_t address)
{
	size_t first = 0, last = function_count;

	while (first < last) {
		size_t middle = first + (last - first) / 2;

		if (functions[middle].address <= address)
			first = middle + 1;
		else
			last = middle;
	}
	return first ? &functions[first - 1] : &other;
}

static void report_hot(struct function *function)
{
	if (function->count == function->reported)
		return;
	fprintf(out, "hot %llu %s\n", (unsigned long long)(function->count - function->reported), function->name);
	function->reported = function->count;
}

static void report_all_hot(void)
{
	for (size_t i = 0; i < function_count; i++)
		report_hot(&functions[i]);
	report_hot(&low);
	report_hot(&other);
}

static void count(unsigned int cpu, void *data)
{
	struct function *function = data;

	(void)cpu;
	all++;
	function->count++;
}

static void report_mark(const struct function *function)
{
	fprintf(out, "mark %s %llu %llu\n", function->name, (unsigned long long)all, (unsigned long long)low.count);
}

static void count_entry(unsigned int cpu, void *data)
{
	struct function *function = data;

	if (function->mark == POINT)
		report_all_hot();
	report_mark(function);
	count(cpu, data);
}

static void count_low(unsigned int cpu, void *data)
{
	if (!low.count)
		report_mark(&low);
	count(cpu, data);
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	/* Before start_kernel() the kernel runs at low addresses too. */
	static bool started;
	size_t length = qemu_plugin_tb_n_insns(tb);

	(void)id;
	for (size_t i = 0; i < length; i++) {
		struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(tb, i);
		uint64_t address = qemu_plugin_insn_vaddr(instruction);
		struct function *function = &low;

		if (address >= KERNEL_MAP) {
			function = function_at(address);
			started |= !strcmp(function->name, "start_kernel");
		} else if (!started) {
			function = function_at(address + KERNEL_MAP);
		}
		bool entry = function->mark && (function->address == address || function->address == address + KERNEL_MAP);
		qemu_plugin_register_vcpu_insn_exec_cb(
			instruction, function == &low ? count_low : entry ? count_entry : count, QEMU_PLUGIN_CB_NO_REGS,
			function);
	}
}

static void ended(qemu_plugin_id_t id, void *data)
{
	(void)id;
	(void)data;
	report_all_hot();
	fprintf(out, "end %llu %llu\n", (unsigned long long)all, (unsigned long long)low.count);
	fclose(out);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
	const char *map = NULL, *marks = NULL, *path = NULL;

	(void)info;
	for (int i = 0; i < argc; i++) {
		if (!strncmp(argv[i], "map=", 4))
			map = argv[i] + 4;
		else if (!strncmp(argv[i], "marks=", 6))
			marks = argv[i] + 6;
		else if (!strncmp(argv[i], "out=", 4))
			path = argv[i] + 4;
		else
			die("unknown argument", argv[i]);
	}
	if (!map || !marks || !path)
		die("needs", "map=, marks= and out=");
	read_map(map);
	read_marks(marks);
	out = fopen(path, "w");
	if (!out)
		die("opening", path);
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	qemu_plugin_register_atexit_cb(id, ended, NULL);
	return 0;
}
